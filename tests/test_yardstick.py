"""The yardstick on a fixed set whose numbers are known: labels that are the student's own distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blackbox_kd.__main__ import main
from blackbox_kd.align.spelling import from_alphabet
from blackbox_kd.config import load_config
from blackbox_kd.corpus import query
from blackbox_kd.errors import AlignmentError
from blackbox_kd.project import Project
from blackbox_kd.settings import Config
from blackbox_kd.student.student import Student
from blackbox_kd.types import Completion, TokenLogprob, TopLogprob, scorer
from blackbox_kd.yardstick import Yardstick, _deciles, captured, evaluation_prompts, fixed_questions, interval
from tests.records import answered
from tests.soft import TEXTS, kl_with_bucket, logprobs_of, rendered, soft_labels, targets

K = 5


@pytest.fixture
def project(project_file: Path) -> Iterator[Project]:
    with Project(load_config(Config, str(project_file))) as opened:
        yield opened


@pytest.fixture
def student(project: Project) -> Student:
    return Student(project.config.student, seed=1)


def own_tokens(student: Student, prompt: Any, text: str, *, flatten: float = 1.0) -> list[TokenLogprob]:
    """The student's own top-k along this answer, as an endpoint would show it; p^flatten, for another teacher."""
    row = student.renderer.render(prompt.messages, text)
    log_p = (logprobs_of(student, row) * flatten).log_softmax(-1)

    def shown(i: int) -> dict[str, Any]:
        piece = student.tokenizer.convert_ids_to_tokens(i)
        if i in student.tokenizer.all_special_ids:
            return {"token": piece, "id": i}
        raw = from_alphabet(piece)
        return {"token": raw.decode("utf-8", "replace"), "id": i, "bytes": list(raw)}

    found = []
    for at, real in zip(log_p, targets(row), strict=True):
        top = at.topk(K)
        others = [TopLogprob(logprob=float(v), **shown(int(i))) for v, i in zip(*top, strict=True)]
        found.append(TokenLogprob(logprob=float(at[real]), top_logprobs=others, **shown(real)))
    return found


def capture_by_hand(project: Project, tokens_of: Any) -> list[str]:
    """Answers to both fixed questions of every prompt; `tokens_of(prompt, text)` are the sampled one's logprobs."""
    config, texts = project.config, []
    by = scorer(config.teacher.model, project.teacher.context.context_hash)
    prompts = evaluation_prompts(project)
    for i, (prompt, pair) in enumerate(
        zip(prompts, fixed_questions(config.evaluate, project.teacher, prompts), strict=True)
    ):
        texts.append(TEXTS[i % len(TEXTS)])
        for request, logprobs in zip(pair, (None, tokens_of(prompt, texts[-1])), strict=True):
            made = Completion(request_key=request.request_key, prompt_id=prompt.prompt_id, author="teacher",
                              model=request.model, text=texts[-1], finish_reason="stop", logprobs=logprobs)  # fmt: skip
            assert project.corpus.try_ingest([answered(made, scorer=by)])
        project.corpus.add_requests(list(pair))
    return texts


def of_split(values: Sequence[Any], project: Project, split: str) -> list[Any]:
    return [value for value, prompt in zip(values, evaluation_prompts(project), strict=True) if prompt.split == split]


# --- measure


def test_a_student_is_no_nats_away_from_itself(project: Project, student: Student) -> None:
    texts = capture_by_hand(project, lambda prompt, text: own_tokens(student, prompt, text))
    yardstick = Yardstick(project, student, captured(project))
    assert yardstick.bound
    measured = yardstick.measure(student)
    assert list(measured) == ["heldout", "ood"]
    rows = [student.renderer.render(p.messages, t) for p, t in zip(evaluation_prompts(project), texts, strict=True)]
    for split, found in measured.items():
        nll, mass = [], []
        for row in of_split(rows, project, split):
            log_q = logprobs_of(student, row)
            nll += [-float(at[i]) for at, i in zip(log_q, targets(row), strict=True)]
            # the K likeliest, and the token that stands there
            kept = [{*at.topk(K).indices.tolist(), i} for at, i in zip(log_q, targets(row), strict=True)]
            mass += [float(at[list(ids)].exp().sum()) for at, ids in zip(log_q, kept, strict=True)]
        assert found["tail_kl"].value == pytest.approx(0.0, abs=1e-5)
        assert found["teacher_nll"].value == pytest.approx(np.mean(nll), rel=1e-4)
        assert found["coverage"] == type(found["coverage"])(value=1.0, lo=1.0, hi=1.0)
        assert found["captured_mass"].value == pytest.approx(np.mean(mass), abs=1e-3)
        assert found["ambiguous_mass"].value == 0.0


def test_another_teacher_is_as_far_as_by_hand_and_by_decile(project: Project, student: Student) -> None:
    capture_by_hand(project, lambda prompt, text: own_tokens(student, prompt, text, flatten=0.3))
    found = Yardstick(project, student, captured(project)).measure(student)["heldout"]
    kls, deciles = [], []
    for prompt, text in of_split(list(zip(evaluation_prompts(project), TEXTS, strict=False)), project, "heldout"):
        row = student.renderer.render(prompt.messages, text)
        for log_q, real in zip(logprobs_of(student, row), targets(row), strict=True):
            log_p = (log_q * 0.3).log_softmax(-1)
            ids = sorted({*log_p.topk(K).indices.tolist(), real})
            kls.append(kl_with_bucket(log_p[ids].tolist(), log_q[ids].tolist()))
            deciles.append(min(9, int(float(log_p[real].exp()) * 10)))
    assert found["tail_kl"].value == pytest.approx(np.mean(kls), abs=1e-3)
    assert found["tail_kl"].value > 0.05
    by_decile = {int(name.rpartition("_")[2]): each.value for name, each in found.items() if "decile" in name}
    assert by_decile == pytest.approx(
        {d: np.mean([kl for kl, of in zip(kls, deciles, strict=True) if of == d]) for d in set(deciles)}, abs=1e-3
    )


def test_a_set_without_logprobs_is_measured_by_its_text(project: Project, student: Student) -> None:
    capture_by_hand(project, lambda prompt, text: None)
    yardstick = Yardstick(project, student, captured(project))
    assert not yardstick.bound
    assert {split: set(found) for split, found in yardstick.measure(student).items()} == {
        "heldout": {"teacher_nll"}, "ood": {"teacher_nll"}
    }  # fmt: skip


def test_answers_without_logprobs_lower_the_coverage_and_nothing_else(project: Project, student: Student) -> None:
    first = evaluation_prompts(project)[0]
    capture_by_hand(project, lambda prompt, text: None if prompt == first else own_tokens(student, prompt, text))
    found = Yardstick(project, student, captured(project)).measure(student)["heldout"]
    tokens = [len(targets(rendered(student, text))) for text in TEXTS[:4]]
    assert found["coverage"].value == pytest.approx(1 - tokens[0] / sum(tokens))
    assert found["tail_kl"].value == pytest.approx(0.0, abs=1e-5)


def test_a_shifted_set_is_refused(project: Project, student: Student) -> None:
    """The tokens are right, but what stands beside each belongs to the next; the endpoint hides the logprob itself."""

    def shifted(prompt: Any, text: str) -> list[TokenLogprob]:
        shown = own_tokens(student, prompt, text)
        sure = [[TopLogprob(token=t.token, id=t.id, bytes=t.bytes, logprob=-0.01)] for t in shown]
        beside = zip(shown, sure[1:] + sure[:1], strict=True)
        return [
            TokenLogprob(token=t.token, id=t.id, bytes=t.bytes, logprob=-9999.0, top_logprobs=top) for t, top in beside
        ]

    capture_by_hand(project, shifted)
    with pytest.raises(AlignmentError, match="shifted or belong to other texts"):
        Yardstick(project, student, captured(project))


def test_what_is_captured_is_read_and_nobody_is_asked(project: Project, student: Student) -> None:
    assert captured(project).answers == []
    capture_by_hand(project, lambda prompt, text: own_tokens(student, prompt, text))
    fixed = captured(project)
    assert len(fixed.answers) == 7
    assert captured(project) == fixed
    assert project.teacher.engine.asked == 0


def test_deciles_are_of_what_the_teacher_thought_of_the_token() -> None:
    #        0.95 -> 9        1 -> 9       0.31 -> 3      0.05 -> 0    not shown -> 0   no label -> -1
    ids = np.array([[7, 1], [7, 0], [1, 7], [7, 1], [1, 2], [0, 0]])
    p = np.array([[0.95, 0.01], [1.0, 0.0], [0.6, 0.31], [0.05, 0.9], [0.5, 0.4], [0.0, 0.0]])
    with np.errstate(divide="ignore"):
        soft = soft_labels(ids, np.log(p))
    assert _deciles(soft, [7] * 6).tolist() == [9, 9, 3, 0, 0, -1]
    assert _deciles(None, [7, 7]).tolist() == [-1, -1]


def test_rows_that_count_for_nothing_have_no_part_in_an_interval() -> None:
    found = interval([3.0, 0.0, 0.0], 400, weights=[2.0, 0.0, 0.0])
    assert (found.lo, found.value, found.hi) == (1.5, 1.5, 1.5)
    assert math.isfinite(interval([3.0, 0.0, 8.0], 400, weights=[2.0, 0.0, 4.0]).lo)
    with pytest.raises(AlignmentError, match="2 rows with 2 weights have no mean"):
        interval([0.0, 0.0], 100, weights=[0.0, 0.0])


# --- looks in the middle of a training


def metrics(project_file: Path, run: str, where: str) -> list[tuple[Any, ...]]:
    sql = f"select stage, checkpoint, round, step, split, name, value, set_id from metrics where {where} order by all"
    return query(project_file.parent / run / "corpus.duckdb", sql)[1]


def test_looks_are_logged_and_change_nothing(project_file: Path) -> None:
    folder = project_file.parent
    for run, every in (("with", "2"), ("without", "null")):
        arguments = ["--run_dir", str(folder / run), "--evaluate.every_steps", every]
        arguments += ["--student.lora.lora_dropout", "0.1", "--sft.trainer.logging_steps", "1"]
        assert main(["run", "--config", str(project_file), *arguments]) == 0
    for name in ("sft", "round-1", "round-2"):
        one, other = (load_file(folder / run / "checkpoints" / name / "adapter_model.safetensors")
                      for run in ("with", "without"))  # fmt: skip
        assert all(torch.equal(one[key], other[key]) for key in one)
    # what training itself logs is the same, and logged as training's
    for stage in ("sft", "onpolicy"):
        own = f"stage = '{stage}' and split in ('train', 'dev')"
        assert metrics(project_file, "with", own) == metrics(project_file, "without", own)
        assert metrics(project_file, "with", own)
    looks = "stage in ('sft', 'onpolicy') and split not in ('train', 'dev')"
    assert metrics(project_file, "without", looks) == []
    seen = metrics(project_file, "with", looks)
    assert {row[:4] for row in seen} == {
        ("sft", "sft", 0, 2), ("sft", "sft", 0, 4), ("onpolicy", "round-1", 1, 2), ("onpolicy", "round-2", 2, 2)
    }  # fmt: skip
    assert {row[4] for row in seen} == {"heldout", "ood"}
    assert {row[5] for row in seen} >= {"teacher_nll", "tail_kl", "coverage", "captured_mass", "ambiguous_mass"}
    # the last step of a round is its checkpoint, which `evaluate` measures on the same set
    at_end = {row[4:] for row in seen if row[0] == "onpolicy"}
    evaluated = {row[4:] for row in metrics(project_file, "with", "stage = 'evaluate' and checkpoint like 'round-%'")}
    assert {row[-1] for row in seen} == {row[-1] for row in evaluated}
    assert at_end <= evaluated


def test_without_a_fixed_set_there_are_no_looks_and_this_is_said(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(project_file), "--evaluate.every_steps", "1"]) == 0
    assert "no look in between" in capsys.readouterr().err
    assert metrics(project_file, "run", "stage = 'sft' and split = 'heldout'") == []


# --- different sets


def test_different_sets_never_share_a_table(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reply in ("yes no", "three"):
        assert main(["evaluate", "--config", str(project_file), "--teacher.reply", reply,
                     "--evaluate.top_logprobs", "null" if reply == "three" else "5"]) == 0  # fmt: skip
    corpus = project_file.parent / "run" / "corpus.duckdb"
    sets = query(corpus, "select set_id, count(*) from leaderboard where split = 'heldout' group by all")[1]
    assert len(sets) == 2
    _, rows = query(corpus, "from leaderboard")
    order = [row[0] for row in rows]
    assert order == sorted(order)  # one set after the other
    assert len({(row[0], *row[1:5]) for row in rows}) == len(rows)
    capsys.readouterr()
    assert main(["status", "--corpus", str(corpus)]) == 0
    shown = capsys.readouterr().out
    assert all(set_id[:8] in shown for set_id, _ in sets)

"""Every stage through its command, on a tiny student and a scripted teacher: results, restarts and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from blackbox_kd.__main__ import main
from blackbox_kd.corpus import query
from tests import warm


def rows(project_file: Path, sql: str) -> list[tuple[Any, ...]]:
    return query(project_file.parent / "run" / "corpus.duckdb", sql)[1]


def adapter(project_file: Path, name: str, run: str = "run") -> dict[str, Any]:
    return load_file(project_file.parent / run / "checkpoints" / name / "adapter_model.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def test_run_goes_from_prompts_to_a_table(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(project_file), "--debug"]) == 0
    shown = capsys.readouterr()
    run_dir = project_file.parent / "run"

    summary = json.loads((run_dir / "summary.json").read_text())
    seen = {(c["name"], c["split"]) for c in summary["checkpoints"]}
    assert seen == {(n, s) for n in ("base", "sft", "round-1", "round-2") for s in ("heldout", "ood", "holdback")}
    for checkpoint in summary["checkpoints"]:
        expected = {"chrf", "exact", "length"}
        if checkpoint["split"] != "holdback":
            expected |= {"teacher_nll", "tail_kl", "coverage", "captured_mass", "ambiguous_mass"}
            expected |= {"distinct_1", "distinct_2", "repetition", "entropy"}
        assert {name for name in checkpoint["metrics"] if "decile" not in name} == expected
        for metric in checkpoint["metrics"].values():
            assert metric["lo"] <= metric["value"] <= metric["hi"]
    base_holdback = next(c for c in summary["checkpoints"] if (c["name"], c["split"]) == ("base", "holdback"))
    assert base_holdback["metrics"]["exact"]["value"] == 1  # compared with itself
    # 6 sampled, 7 fixed prompts x 2, 3 rewrites in each of 2 rounds
    assert summary["spend"]["calls"] == 6 + 14 + 6

    for name in ("sft", "round-1", "round-2"):
        card = (run_dir / "checkpoints" / name / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert front["library_name"] == "peft"
        assert "distillation" in front["tags"]
    assert "heldout" in shown.out
    assert "blackbox-kd sql" in shown.out

    counts = rows(project_file, "select author, round, count(*) from completions group by all order by all")
    assert counts == [("student", 0, 34), ("student", 1, 20), ("student", 2, 20), ("teacher", 0, 20),
                      ("teacher", 1, 3), ("teacher", 2, 3)]  # fmt: skip
    assert not same(adapter(project_file, "sft"), adapter(project_file, "round-1"))
    assert not same(adapter(project_file, "round-1"), adapter(project_file, "round-2"))
    page = (run_dir / "report.html").read_text("utf-8")
    assert str(run_dir / "report.html") in shown.out
    assert "its teacher than sft" in page
    assert "Not finished" not in page
    assert page.count('<article class="example">') == 4 + 3  # heldout prompts, drafts of the last round
    assert 'nats">' in page
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in logged} == {"sft", "onpolicy", "evaluate"}

    # and once more: nothing is asked, nothing changes
    before = (run_dir / "summary.json").read_text()
    attempts = rows(project_file, "select count(*) from attempts")
    assert main(["run", "--config", str(run_dir / "config.yaml")]) == 0
    again = capsys.readouterr()
    assert "asked nothing" in again.err
    assert "round-2" in again.out
    assert main(["run", "--config", str(run_dir / "config.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert rows(project_file, "select count(*) from attempts") == attempts
    assert json.loads((run_dir / "summary.json").read_text()) == json.loads(before)


def test_a_round_that_was_killed_is_repeated_exactly(trained: Path) -> None:
    project_file, folder = trained, trained.parent
    assert main(["run", "--config", str(project_file)]) == 0
    asked = rows(project_file, "select count(*) from attempts")
    shutil.copytree(folder / "run", folder / "killed")
    for name in ("round-1", "round-2"):  # as if the process had died before the first round was committed
        shutil.rmtree(folder / "killed" / "checkpoints" / name)
    (folder / "killed" / "checkpoints" / ".round-1.partial").mkdir()
    arguments = ["--run_dir", str(folder / "killed"), "--corpus", str(folder / "run" / "corpus.duckdb")]
    assert main(["onpolicy", "--config", str(project_file), *arguments]) == 0
    for name in ("round-1", "round-2"):
        assert same(adapter(project_file, name), adapter(project_file, name, "killed"))
    assert rows(project_file, "select count(*) from attempts") == asked
    evaluated = rows(project_file, "select distinct checkpoint from metrics where stage = 'evaluate' order by all")
    assert evaluated == [("base",), ("sft",), ("teacher",)]  # the rounds' own numbers are of the earlier ones


def test_the_second_round_alone_is_the_same_as_in_one_go(trained: Path) -> None:
    project_file, folder = trained, trained.parent
    shutil.copytree(folder / "run", folder / "steps")
    assert main(["onpolicy", "--config", str(project_file)]) == 0
    for rounds in ("1", "2"):
        arguments = ["--run_dir", str(folder / "steps"), "--onpolicy.rounds", rounds]
        assert main(["onpolicy", "--config", str(project_file), *arguments]) == 0
    assert same(adapter(project_file, "round-2"), adapter(project_file, "round-2", "steps"))


def test_sft_learns_the_answers_and_keeps_dev_apart(project_file: Path) -> None:
    arguments = ["--sft.trainer.learning_rate", "1e-2", "--sft.trainer.num_train_epochs", "6"]
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(project_file), *arguments]) == 0
    history = rows(
        project_file, "select value from metrics where stage = 'sft' and split = 'dev' and name = 'nll' order by step"
    )
    assert history[-1][0] < history[0][0]
    assert not (project_file.parent / "run" / "trainer").exists()


def test_a_shorter_sft_leaves_no_steps_of_the_one_before(trained: Path) -> None:
    last = "select max(step) from metrics where stage = 'sft'"
    ((before,),) = rows(trained, last)
    shutil.rmtree(trained.parent / "run" / "checkpoints")
    assert main(["sft", "--config", str(trained), "--sft.trainer.num_train_epochs", "1"]) == 0
    assert rows(trained, last) == [(before // 2,)]


def test_sft_that_was_killed_goes_on_from_its_last_epoch(
    project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = project_file.parent
    stretch = ["--sft.early_stopping_patience", "5"]
    assert main(["sample", "--config", str(project_file)]) == 0
    shutil.copytree(folder / "run", folder / "killed")
    assert main(["sft", "--config", str(project_file), *stretch]) == 0

    # a first start that ends after one epoch and leaves TRL's checkpoint behind, as a kill would
    import blackbox_kd.sft as sft
    from blackbox_kd.command import overrides
    from blackbox_kd.config import load_config
    from blackbox_kd.hashing import content_id
    from blackbox_kd.project import Project
    from blackbox_kd.settings import Config
    from blackbox_kd.sft_trainer import build_trainer
    from blackbox_kd.student.student import Student

    flags = overrides([*stretch, "--run_dir", str(folder / "killed")])
    with Project(load_config(Config, str(project_file), flags)) as project:
        student = Student(project.config.student, seed=project.config.seed)
        answers = sft.training_answers(project)
        rows = sft.labelled(project, student, answers)[0]
        seen = content_id([(row.completion_id, row.soft is not None) for row in rows])
        sft.keep_if_same(project.run_dir.path / "trainer", project.settings_of("sft") | {"rows": seen})
        train, dev = sft.split_dev(list(zip(answers, rows, strict=True)), project.config.sft.dev_fraction)
        work = project.run_dir.path / "trainer"
        trainer = build_trainer(student, project.config, train, dev, work)

        from transformers import TrainerCallback

        class Kill(TrainerCallback):  # type: ignore[misc]
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.epoch and state.epoch >= 1:
                    raise KeyboardInterrupt

        trainer.add_callback(Kill())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    shutil.copytree(folder / "killed", folder / "changed")
    for weights in (folder / "changed" / "trainer").glob("checkpoint-*/adapter_model.safetensors"):
        save_file({name: 0 * value for name, value in load_file(weights).items()}, weights)
    for run in ("killed", "changed"):
        assert main(["sft", "--config", str(project_file), *stretch, "--run_dir", str(folder / run)]) == 0
    assert same(adapter(project_file, "sft"), adapter(project_file, "sft", "killed"))
    assert not same(adapter(project_file, "sft"), adapter(project_file, "sft", "changed"))  # it did not begin anew


def test_answers_whose_logprobs_cannot_be_told_are_said(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same questions under another private prompt: a comment that is not sent makes it another one."""
    template = project_file.parent / "rules.md.j2"
    private = ["--teacher.prompt.template", str(template)]
    template.write_text("Be brief.")
    assert main(["sample", "--config", str(project_file), *private]) == 0
    template.write_text("{# of today #}Be brief.")
    other = ["--run_dir", str(project_file.parent / "two"), "--corpus", str(project_file.parent / "run/corpus.duckdb")]
    assert main(["sft", "--config", str(project_file), *private, *other]) == 0
    assert "sft: no answer has top-logprobs by" in capsys.readouterr().err


def test_other_settings_do_not_mix_with_an_old_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", str(trained), "--sft.trainer.learning_rate", "1e-2"]) == 2
    assert "was made with sft.trainer.learning_rate 0.001, the config now says 0.01" in capsys.readouterr().err


@pytest.mark.parametrize("edit", ["teacher", "rewrite"])
def test_an_edited_template_is_another_experiment(
    edit: str, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = project_file.parent / "rules.md.j2"
    rules.write_text("Be short.")
    private = ["--teacher.prompt.template", str(rules)]
    assert main(["run", "--config", str(project_file), *private]) == 0
    edited = rules if edit == "teacher" else project_file.parent / "rewrite.md.j2"
    edited.write_text(edited.read_text() + " Really.")
    assert main(["run", "--config", str(project_file), *private]) == 2
    assert ("questions" if edit == "teacher" else "algorithm_files") in capsys.readouterr().err
    # refused before anything was asked or written
    assert rows(project_file, "select count(*) from attempts") == [(26,)]


def test_a_killed_sft_is_not_continued_under_other_settings(tmp_path: Path) -> None:
    from blackbox_kd.sft import keep_if_same

    work = tmp_path / "trainer"
    keep_if_same(work, {"lr": 1})
    for name, whole in (("checkpoint-1", True), ("checkpoint-2", False)):
        (work / name).mkdir()
        if whole:
            (work / name / "trainer_state.json").write_text("{}")
    keep_if_same(work, {"lr": 1})
    assert sorted(p.name for p in work.glob("checkpoint-*")) == ["checkpoint-1"]
    keep_if_same(work, {"lr": 2})
    assert not list(work.glob("checkpoint-*"))


def test_a_run_that_stops_at_its_budget_leaves_a_report(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(project_file), "--max-requests", "3"]) == 4
    assert (project_file.parent / "run" / "report.html").exists()
    assert "no report" not in capsys.readouterr().err


def test_more_draws_in_a_shared_corpus_are_not_learnt_by_a_run_that_did_not_ask_for_them(project_file: Path) -> None:
    from blackbox_kd.command import overrides
    from blackbox_kd.config import load_config
    from blackbox_kd.project import Project
    from blackbox_kd.settings import Config

    assert main(["sample", "--config", str(project_file), "--teacher.seed", "99"]) == 0
    assert main(["sample", "--config", str(project_file), "--sample.n", "3"]) == 0
    assert main(["sample", "--config", str(project_file)]) == 0
    for flags, expected in (([], 6), (["--sample.n", "3"], 18), (["--teacher.seed", "99"], 6)):
        with Project(load_config(Config, str(project_file), overrides(flags))) as project:
            assert len(project.training_rows()) == expected


def test_an_edit_that_asks_the_same_is_answered_from_the_corpus_and_learnt(project_file: Path) -> None:
    rules = project_file.parent / "rules.md.j2"
    rules.write_text("Be short.")
    private = ["--teacher.prompt.template", str(rules)]
    assert main(["sample", "--config", str(project_file), *private]) == 0
    rules.write_text("Be short.{# a comment #}")
    for stage in ("sample", "sft"):
        assert main([stage, "--config", str(project_file), *private]) == 0
    assert rows(project_file, "select count(*) from attempts") == [(6,)]


def test_an_endpoint_that_rejects_everything_is_code_3_and_can_be_asked_again(
    project_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.fakes import FakeAPI, error_reply, served

    with served(FakeAPI(lambda body, request: error_reply(400, "no such parameter"))) as api:
        teacher = {"provider": "openai", "model": "m", "api_key_env": None, "base_url": api.url}
        asked = ["sample", "--config", str(project_file), "--teacher"]
        assert main([*asked, json.dumps(teacher)]) == 3
        assert "all 6 requests were rejected" in capsys.readouterr().err
        assert len(api.bodies) == 6
        assert main([*asked, json.dumps(teacher | {"retry_dead_letters": True})]) == 3
        assert len(api.bodies) == 12


def test_the_trainer_block_reaches_trl_untouched(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--config", str(project_file)]) == 0
    assert main(["sft", "--config", str(project_file), "--sft.trainer.learning_rat", "1"]) == 2
    assert "learning_rat" in capsys.readouterr().err


def test_sft_without_answers_says_what_to_do(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", str(project_file)]) == 2
    assert "run `sample` first" in capsys.readouterr().err


def test_onpolicy_without_sft_says_what_to_do(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["onpolicy", "--config", str(project_file)]) == 2
    assert "run `sft` first" in capsys.readouterr().err


def test_too_much_failed_feedback_stops_with_3(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # what `sample` bought came from the same model, so it stays valid; from here on the teacher is silent
    silent = ["--teacher.reply", "' '"]
    assert main(["onpolicy", "--config", str(trained), *silent]) == 3
    assert "3 of 3 replies could not be used" in capsys.readouterr().err


def test_prompts_that_were_not_sampled_come_first(project_file: Path) -> None:
    from blackbox_kd.config import load_config
    from blackbox_kd.project import Project
    from blackbox_kd.settings import Config
    from blackbox_kd.trainee import draw

    with Project(load_config(Config, str(project_file))) as project:
        sampled = {p.prompt_id for p in project.sampled_prompts}
        rounds = [[p.prompt_id for p in draw(project, r)] for r in range(1, 6)]
    assert not sampled & {i for r in rounds[:2] for i in r}
    assert {i for r in rounds[2:4] for i in r} == sampled
    assert rounds[4] == rounds[0]


def test_evaluate_prints_json_of_the_promised_shape(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--config", str(project_file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in summary["checkpoints"]] == ["base"] * 3
    assert {"calls", "prompt_tokens", "completion_tokens", "cost_usd"} <= set(summary["spend"])
    assert summary["spend"]["cost_usd"] is None  # a scripted teacher has no price


def test_export_is_what_datasets_and_trl_read(trained: Path) -> None:
    from datasets import load_dataset

    out = trained.parent / "out"
    assert main(["run", "--config", str(trained)]) == 0
    corpus = ["--corpus", str(trained.parent / "run" / "corpus.duckdb")]
    assert main(["export-corpus", "--out", str(out), *corpus]) == 0
    for form, suffix in (("parquet", "parquet"), ("json", "jsonl")):
        sft = load_dataset(form, data_files=str(out / f"sft.{suffix}"), split="train", cache_dir=str(out / "cache"))
        assert len(sft) == 6
        assert [m["role"] for m in sft[0]["messages"]] == ["user", "assistant"]
        pairs = load_dataset(
            form, data_files=str(out / f"preference.{suffix}"), split="train", cache_dir=str(out / "cache")
        )
        assert len(pairs) == 6
        assert pairs[0]["chosen"][0]["role"] == pairs[0]["rejected"][0]["role"] == "assistant"
        assert pairs[0]["prompt"][-1]["role"] == "user"
    assert (out / "tables" / "attempts.parquet").exists()


def test_status_and_sql_answer_from_the_last_run(
    project_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project_file.parent)
    assert main(["sample", "--config", str(project_file), "--run_dir", "runs/a"]) == 0
    capsys.readouterr()
    assert main(["sql", "--json", "select author, count(*) as n from completions group by all"]) == 0
    assert json.loads(capsys.readouterr().out) == {"author": "teacher", "n": 6}
    assert main(["sql", "from spend"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("run_id\tpurpose")
    assert main(["status", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["answers"] == [{"author": "teacher", "purpose": "sample", "round": 0, "answers": 6}]


def test_the_corpus_can_be_read_while_a_stage_holds_nothing(project_file: Path) -> None:
    from blackbox_kd.config import load_config
    from blackbox_kd.project import Project
    from blackbox_kd.settings import Config

    with Project(load_config(Config, str(project_file))):
        assert rows(project_file, "select count(*) from prompts") == [(10,)]  # the train prompts come with `sample`


def test_ctrl_c_ends_training_at_once_and_leaves_the_run_resumable(project_file: Path) -> None:
    assert main(["sample", "--config", str(project_file)]) == 0
    said, run = project_file.parent / "stderr", project_file.parent / "run"
    endless = ["--sft.trainer.num_train_epochs", "5000", "--sft.early_stopping_patience", "5000"]
    process = warm.start("sft", "--config", str(project_file), *endless, said=said)
    deadline = time.monotonic() + 120
    while not list((run / "trainer").glob("checkpoint-*")):
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert process.pid
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=30)
    assert process.exitcode == 130
    assert "the same command goes on from here" in said.read_text()
    assert "Traceback" not in said.read_text()

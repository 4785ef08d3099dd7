"""Loading, writing, scoring and saving with a real (tiny) model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from blackbox_kd.errors import AlignmentError, ModelError
from blackbox_kd.sections import LoraSection, StudentConfig
from blackbox_kd.student.load import base_id, pick_dtype
from blackbox_kd.student.render import IGNORE
from blackbox_kd.student.student import Student, first_kept, logits_from
from blackbox_kd.types import SamplingParams
from tests.soft import TEXTS, rendered, targets, teacher_of
from tests.tiny import TEMPLATE, make_tiny

SAMPLING = SamplingParams(max_completion_length=8)


@pytest.fixture(scope="module")
def student(tiny_model: Path) -> Student:
    return Student(StudentConfig(model=str(tiny_model), device="cpu"))


def test_a_fresh_adapter_changes_nothing(student: Student) -> None:
    row = student.renderer.render([{"role": "user", "content": "Say 1"}], "one")
    ours = student.logprobs([row], batch_size=1)
    with student.model.disable_adapter():
        assert ours == student.logprobs([row], batch_size=1)
    assert student.policy == student.policy_of(None) != "base:"
    assert student.policy.startswith("base:")


def test_logprobs_are_those_of_the_model(student: Student) -> None:
    row = student.renderer.render([{"role": "user", "content": "Say 1"}], "one")
    with torch.no_grad():
        logits_TV = student.model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    start = next(i for i, label in enumerate(row.labels) if label != IGNORE)
    expected = [logits_TV[t - 1, row.input_ids[t]].item() for t in range(start, len(row.input_ids))]
    assert student.logprobs([row], batch_size=4)[0] == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_change_logprobs(student: Student) -> None:
    short = student.renderer.render([{"role": "user", "content": "Say 1"}], "yes")
    long = student.renderer.render([{"role": "user", "content": "Say 1 2 3 4 5 6"}], "one two three four five")
    alone = [student.logprobs([row], batch_size=1)[0] for row in (short, long)]
    together = student.logprobs([short, long], batch_size=2)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_rows_of_a_batch_are_scored_as_each_alone(student: Student) -> None:
    rows = [rendered(student, text) for text in TEXTS[:4]]
    soft = [teacher_of(rows[0], k=5), None, teacher_of(rows[2], k=2, without={1}), teacher_of(rows[3])]
    alone = [student.score([row], [label], batch_size=1, k=4)[0] for row, label in zip(rows, soft, strict=True)]
    together = student.score(rows, soft, batch_size=4, k=4)
    for row, label, one, other in zip(rows, soft, alone, together, strict=True):
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)
        assert other.tail_kl == pytest.approx(one.tail_kl, abs=1e-5, nan_ok=True)
        unlabelled = [True] * len(targets(row)) if label is None else (label.logprobs == -np.inf).all(1).tolist()
        assert np.isnan(other.tail_kl).tolist() == unlabelled
        assert other.top.ids.tolist() == one.top.ids.tolist()
        assert other.top.ids.shape == (len(targets(row)), 4)
        assert other.top.logprobs == pytest.approx(one.top.logprobs, abs=1e-5)


def test_soft_labels_of_another_length_are_refused(student: Student) -> None:
    one, other = rendered(student, "one"), rendered(student, "one two three")
    with pytest.raises(AlignmentError, match="soft labels for 2 supervised tokens"):
        student.score([one], [teacher_of(other)], batch_size=1)


def test_the_head_runs_on_the_kept_columns_only_and_gives_the_same_logits(student: Student) -> None:
    rows = [student.renderer.render([{"role": "user", "content": text}], "yes") for text in ("Say 1", "Say 1 2 3")]
    input_ids, mask = student.pad([row.input_ids for row in rows], "right")
    kept = torch.zeros_like(mask, dtype=torch.bool)
    for row, answer in zip(kept, rows, strict=True):
        row[: len(answer.labels)] = torch.tensor(answer.labels) != IGNORE
    first = first_kept(kept)
    assert first == len(student.renderer.prompt([{"role": "user", "content": "Say 1"}]))
    with torch.no_grad():
        whole = student.model(input_ids=input_ids, attention_mask=mask).logits[:, first - 1 : -1]
        nothing = logits_from(student.model, input_ids, mask, input_ids.shape[1])
    ours = logits_from(student.model, input_ids, mask, first)
    assert ours.grad_fn
    assert "Slice" not in ours.grad_fn.name()  # whose backward would fill another tensor of their size
    assert nothing.shape == (2, 0, whole.shape[2])
    assert ours.shape == whole.shape
    assert torch.allclose(ours, whole, atol=1e-5)


def test_columns_that_nothing_predicts_do_not_count() -> None:
    assert first_kept(torch.tensor([[True, False, True], [False, False, False]])) == 2
    assert first_kept(torch.zeros(2, 3, dtype=torch.bool)) == 3


def test_padding_does_not_change_greedy_answers(student: Student) -> None:
    prompts = [student.renderer.prompt([{"role": "user", "content": text}]) for text in ("Say 1", "Say 1 2 3 4 5 6")]
    greedy = SamplingParams(temperature=0.0, max_completion_length=8)
    together = student.generate(prompts, greedy, batch_size=2, seed=0, description="t")
    alone = student.generate(prompts, greedy, batch_size=1, seed=0, description="t")
    assert together == alone


def test_the_same_seed_draws_the_same_tokens_and_leaves_the_state_alone(student: Student) -> None:
    prompts = [student.renderer.prompt([{"role": "user", "content": "Say 1"}])] * 4
    before = torch.get_rng_state()
    first = student.generate(prompts, SAMPLING, batch_size=2, seed=1, description="t")
    assert torch.equal(before, torch.get_rng_state())
    assert first == student.generate(prompts, SAMPLING, batch_size=2, seed=1, description="t")
    assert first != student.generate(prompts, SAMPLING, batch_size=2, seed=2, description="t")


def test_a_completion_ends_with_its_first_end_token(student: Student) -> None:
    prompts = [student.renderer.prompt([{"role": "user", "content": f"Say {i}"}]) for i in range(64)]
    drawn = student.generate(prompts, SamplingParams(max_completion_length=64), batch_size=64, seed=3, description="t")
    end = student.renderer.end_id
    assert all(end not in ids[:-1] for ids in drawn)
    assert all(len(ids) == 64 or ids[-1] == end for ids in drawn)
    assert any(len(ids) < 64 for ids in drawn)  # 1/320 a token: 64 of 64 tokens without one happen once in 10^5


def test_saved_and_loaded_it_is_the_same_student(student: Student, tmp_path: Path) -> None:
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    student.save(tmp_path / "a")
    student.save(tmp_path / "b")
    loaded = [Student(student.config, adapter=tmp_path / name) for name in "ab"]
    row = student.renderer.render([{"role": "user", "content": "Say 1"}], "one")
    assert loaded[0].logprobs([row], batch_size=1) == student.logprobs([row], batch_size=1)
    assert loaded[0].policy == loaded[1].policy == student.policy_of(tmp_path / "a") != student.policy
    assert any(p.requires_grad for p in loaded[0].model.parameters())
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def test_the_seed_makes_the_adapter(tiny_model: Path) -> None:
    def lora_a(seed: int) -> torch.Tensor:
        model = Student(StudentConfig(model=str(tiny_model), device="cpu"), seed=seed).model
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(lora_a(1), lora_a(1))
    assert not torch.equal(lora_a(1), lora_a(2))


@pytest.mark.parametrize(
    ("model", "said"),
    [("no/such-model", "cannot be loaded"), ("missing.gguf", "no such file"), ("nopackage:x.gguf", "is not installed")],
)
def test_a_model_that_cannot_be_loaded_is_one_line(model: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        Student(StudentConfig(model=model, device="cpu"))
    assert "\n" not in str(caught.value)
    assert model in str(caught.value)


def test_a_broken_gguf_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLACKBOX_KD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ModelError, match=r"broken\.gguf") as caught:
        Student(StudentConfig(model=str(tmp_path / "broken.gguf"), device="cpu"))
    assert "\n" not in str(caught.value)


def test_lora_that_does_not_fit_is_one_line(tiny_model: Path) -> None:
    config = StudentConfig(model=str(tiny_model), device="cpu", lora=LoraSection(target_modules=["nope"]))
    with pytest.raises(ModelError, match="LoRA on"):
        Student(config)


def test_layers_go_with_all_linear_and_the_adapter_loads_again(tiny_model: Path, tmp_path: Path) -> None:
    lora = LoraSection(layers_to_transform=[1])
    config = StudentConfig(model=str(tiny_model), device="cpu", lora=lora)
    student = Student(config)
    adapted = {name.split(".lora_A")[0] for name, p in student.model.named_parameters() if ".lora_A" in name}
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in adapted} == names
    assert len(adapted) == 7
    assert all(".layers.1." in name for name in adapted)
    student.save(tmp_path / "a")
    again = Student(config, adapter=tmp_path / "a")
    assert again.model.state_dict().keys() == student.model.state_dict().keys()


def test_a_layer_that_the_model_does_not_have_is_one_line(tiny_model: Path) -> None:
    lora = LoraSection(layers_to_transform=[1, 2])
    with pytest.raises(ModelError, match=r"lora\.layers_to_transform \[1, 2\]: its layers are 0 to 1"):
        Student(StudentConfig(model=str(tiny_model), device="cpu", lora=lora))


def test_a_policy_follows_content_and_not_names(tmp_path: Path, student: Student) -> None:
    def loaded(name: str, **options: Any) -> Student:
        return Student(StudentConfig(model=str(make_tiny(tmp_path / name, **options)), device="cpu"))

    one, same, other, spoken = (
        loaded("a"), loaded("b"), loaded("c", seed=1), loaded("d", template="{{ '' }}" + TEMPLATE),
    )  # fmt: skip
    assert one.policy == same.policy
    assert len({one.policy, other.policy, spoken.policy}) == 3  # weights, chat template
    one.save(tmp_path / "adapter")
    assert one.policy_of(tmp_path / "adapter") == same.policy_of(tmp_path / "adapter")
    assert one.policy_of(tmp_path / "adapter") != other.policy_of(tmp_path / "adapter")


def test_a_commit_names_a_model_of_the_hub() -> None:
    class Hub:
        config = SimpleNamespace(_commit_hash="abc")

    assert base_id("org/name", Hub()) == "abc"


def test_dtype_on_a_cpu_is_float32_unless_named() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype(StudentConfig(model="m"), cpu) == torch.float32
    assert pick_dtype(StudentConfig(model="m", dtype="bfloat16"), cpu) == torch.bfloat16


def test_what_a_model_ships_for_generation_does_not_bend_its_samples(tiny_model: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(tiny_model, tmp_path / "bent"))
    path = folder / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 5.0, "do_sample": True, "top_k": 1})
    )
    students = [Student(StudentConfig(model=str(f), device="cpu")) for f in (tiny_model, folder)]
    prompts = [students[0].renderer.prompt([{"role": "user", "content": "Say 1 1 1 1"}])]
    for sampling in (SAMPLING, SamplingParams(temperature=0.0, max_completion_length=8)):
        plain, bent = (s.generate(prompts, sampling, batch_size=1, seed=3, description="t") for s in students)
        assert plain == bent

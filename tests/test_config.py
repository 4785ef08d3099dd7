"""One YAML, its flags, and one line for whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd.algorithms import algorithms
from blackbox_kd.command import overrides
from blackbox_kd.config import SHIPPED, config_path, dump_config, find_file, load_config, validate, walk
from blackbox_kd.errors import ConfigError
from blackbox_kd.run_dir import RunDir
from blackbox_kd.settings import Config

MINIMAL = """
run_dir: runs/x
prompts: {path: p}
teacher: {provider: scripted}
student: {model: s}
onpolicy: {algorithm: {name: relabel}}
"""

Load = Callable[..., Config]

NAMES = [each.model_fields["name"].default for each in algorithms()]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """`load("--a.b", "1")` = a minimal config with flags; `load(more="sft: {...}")` = with more in the file."""

    def go(*flags: str, more: str = "") -> Config:
        path = tmp_path / "mine.yaml"
        path.write_text(MINIMAL + more, "utf-8")
        return load_config(Config, str(path), overrides(flags))

    return go


def complaint(load: Load, *flags: str, more: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(*flags, more=more)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(SHIPPED), "").rpartition("mine.yaml: ")[2]


def test_a_minimal_config_gets_the_documented_defaults(load: Load) -> None:
    config = load()
    assert (config.seed, config.corpus, config.sample.n, config.sample.top_logprobs) == (42, None, 1, 20)
    assert (config.sample.temperature, config.sample.top_p) == (1.0, 1.0)
    assert config.onpolicy.replay == 0.25
    assert config.corpus_path == Path("runs/x/corpus.duckdb")


def test_flags_beat_the_file_and_are_read_as_yaml(load: Load) -> None:
    config = load(
        "--sample.n", "3", "--sample.max_prompts=8", "--corpus", "/c.duckdb", "--student.lora.target_modules", "[q, v]",
        "--evaluate.top_logprobs", "null", more="sample: {n: 2, temperature: 0.5, top_logprobs: null}",
    )  # fmt: skip
    assert (config.sample.n, config.sample.max_prompts, config.sample.temperature) == (3, 8, 0.5)
    assert config.corpus_path == Path("/c.duckdb")
    assert config.student.lora.target_modules == ["q", "v"]
    assert config.evaluate.top_logprobs is None


def test_of_two_flags_for_one_key_the_last_counts(load: Load) -> None:
    assert load("--seed", "1", "--seed=2").seed == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3E5", 3e5), ("-2.5e+1", -25.0), (".5e1", 5.0), ("1.e0", 1.0), ("0.1", 0.1), ("7", 7)],
)
def test_a_learning_rate_is_a_number_in_file_and_flag(load: Load, text: str, value: float) -> None:
    in_file = load(more=f"sft: {{trainer: {{learning_rate: {text}}}}}").sft.trainer["learning_rate"]
    in_flag = load("--sft.trainer.learning_rate", text).sft.trainer["learning_rate"]
    assert in_file == in_flag == value
    assert type(in_file) is type(value)


@pytest.mark.parametrize("text", ["1e", "e5", "1e-4x", "'1e-4'", "v1e4"])
def test_what_only_looks_like_a_number_stays_text(load: Load, text: str) -> None:
    assert load(f"--sft.trainer.output_dir={text}").sft.trainer["output_dir"] == text.strip("'")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("smaple.n", "unknown key 'smaple'; did you mean 'sample'?"),
        ("sample.temprature", "unknown key 'sample.temprature'; did you mean 'sample.temperature'?"),
        ("teacher.modle", "unknown key 'teacher.modle'; did you mean 'teacher.model'?"),
        ("student.lroa.r", "unknown key 'student.lroa'; did you mean 'student.lora'?"),
        ("onpolicy.algorithm.mod", "unknown key 'onpolicy.algorithm.mod'; did you mean 'onpolicy.algorithm.mode'?"),
        ("onpolicy.update.learning_rat", "did you mean 'onpolicy.update.learning_rate'?"),
        ("gguf", "did you mean 'teacher.gguf'?"),
        ("prompts.qqq", "unknown key 'prompts.qqq'; known in prompts: leak_jaccard, leaks, limits, path"),
    ],
)
def test_an_unknown_key_is_an_error_that_says_what_was_meant(load: Load, flag: str, meant: str) -> None:
    assert meant in complaint(load, f"--{flag}", "1")


def test_an_unknown_key_in_the_file_names_the_file(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key 'sedd'; did you mean 'seed'\?$"):
        load(more="sedd: 1")


def test_a_misspelt_key_is_named_before_the_key_that_is_therefore_missing(load: Load) -> None:
    assert complaint(load, "--teacher", "{provider: openai, modle: m}").startswith("unknown key 'teacher.modle'")


def test_a_key_of_another_provider_is_not_offered_as_its_own_correction(load: Load) -> None:
    message = complaint(load, "--teacher", "{provider: openai, model: m, threads: 2}")
    assert message.startswith("unknown key 'teacher.threads'")
    assert "did you mean 'teacher.threads'" not in message


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("sample.n", "many", "sample.n: should be a valid integer, unable to parse string as an integer, it is 'many'"),
        ("sample.n", "0", "sample.n: should be greater than or equal to 1, it is 0"),
        ("sample.top_p", "1.5", "sample.top_p: should be less than or equal to 1, it is 1.5"),
        ("seed", "1.5", "seed: should be a valid integer, got a number with a fractional part, it is 1.5"),
        ("teacher.model", "4", "teacher.model: should be a valid string, it is 4"),
        ("student.dtype", "int3", "student.dtype: should be 'auto', 'float32', 'bfloat16' or 'float16', it is 'int3'"),
        ("prompts.limits", "{trian: 5}", "prompts.limits.trian: should be 'train', 'heldout', 'ood' or 'holdback', "
                                         "it is 'trian'"),
        ("prompts.limits.train", "-1", "prompts.limits.train: should be greater than or equal to 0, it is -1"),
        ("student.lora.target_modules", "5", "student.lora.target_modules: should be a valid string, it is 5 "
                                             "(and 1 more)"),
        ("student.lora.layers_to_transform", "[-1]",
         "student.lora.layers_to_transform: should be greater than or equal to 0, it is -1"),
        ("sample", "", "sample: should be a section with keys of its own, it is a NoneType"),
        ("teacher.extra_body", "[1]", "teacher.extra_body: should be a section with keys of its own, it is a list"),
        ("sample.temperature", ".inf", "sample.temperature: should be a finite number, it is inf"),
        ("sample.top_p", ".nan", "sample.top_p: should be a finite number, it is nan"),
        ("onpolicy.algorithm.name", "relable", f"onpolicy.algorithm.name: 'relable' is none of {', '.join(NAMES)}"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_key_and_value(load: Load, flag: str, value: str, said: str) -> None:
    assert complaint(load, f"--{flag}", value) == said


@pytest.mark.parametrize("value", ["{since: 2025-01-31}", "{x: [.inf]}", "{x: {1: 2, a: 3}}"])
def test_what_is_sent_has_to_be_json(load: Load, value: str) -> None:
    assert complaint(load, "--teacher.extra_body", value).startswith("teacher.extra_body: it is no JSON: ")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("{target_modules: '.*proj', layers_to_transform: [1]}",
         "student.lora: layers_to_transform needs target_modules as a list of names or as all-linear"),
        ("{layers_to_transform: []}", "student.lora.layers_to_transform: list should have at least 1 item"),
    ],
)  # fmt: skip
def test_layers_go_with_names_of_modules(load: Load, lora: str, said: str) -> None:
    assert complaint(load, "--student.lora", lora).startswith(said)
    assert load("--student.lora", "{layers_to_transform: [1]}").student.lora.all_linear


def test_a_required_key_that_is_missing_is_named(load: Load) -> None:
    assert complaint(load, "--student", "{dtype: auto}") == "student.model: this key is required"
    assert complaint(load, "--teacher.price", "{input: 1}") == "teacher.price.output: this key is required"


def test_an_unknown_provider_lists_the_names(load: Load) -> None:
    wrong = "teacher.provider: 'opena' is none of openai, local, scripted"
    assert complaint(load, "--teacher.provider", "opena") == wrong


def test_a_teacher_without_a_provider_lists_the_names_and_hides_the_rest(load: Load) -> None:
    message = complaint(load, "--teacher", "{model: m, extra_headers: {authorization: Bearer sk-1}}")
    assert message == "teacher.provider: this key is required, one of openai, local, scripted"


@pytest.mark.parametrize("name", ["Authorization", "api-key", "X-API-Key", "x-auth-token", "Cookie"])
def test_a_key_in_a_header_has_to_be_a_variable(load: Load, name: str) -> None:
    teacher = "{{provider: openai, model: m, api_key_env: null, extra_headers: {{{}: {}}}}}"
    message = complaint(load, "--teacher", teacher.format(name, "Bearer sk-1"))
    said = f"keys are in no file: write {name}: $NAME, and set the environment variable NAME"
    assert message == f"teacher.extra_headers: {said}"
    assert load("--teacher", teacher.format(name, "Bearer $MY_KEY")).teacher.extra_headers == {name: "Bearer $MY_KEY"}


def test_a_flag_below_a_value_says_so(load: Load) -> None:
    assert complaint(load, "--run_dir.deep", "1") == "--run_dir.deep: 'run_dir' is a value, not a section"


def test_a_flag_fills_a_section_that_the_file_leaves_empty(load: Load) -> None:
    assert load("--sample.n", "3", more="sample:").sample.n == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["n", "3"], "what is 'n'?"), (["--sample.n"], "--sample.n needs a value"),
     (["--sample.n", "--seed", "1"], "--sample.n needs a value"), (["--sample.n", "[1"], "--sample.n: not valid YAML"),
     (["--run_dir", "2025-31-01"], "--run_dir: not valid YAML: month must be in 1..12")],
)  # fmt: skip
def test_a_broken_flag_is_one_line(load: Load, flags: list[str], said: str) -> None:
    assert said in complaint(load, *flags)


def test_a_value_may_begin_with_a_single_dash_or_hold_an_equals_sign() -> None:
    assert overrides(["--a", "-1", "--b=x=y", "--c="]) == [("a", "-1"), ("b", "x=y"), ("c", "")]


def test_a_missing_config_file_lists_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match=r"--config: no file 'quikstart'; shipped configs are .*quickstart"):
        load_config(Config, "quikstart")


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "not valid YAML: while parsing"), ("- 1", "must be a mapping of sections, it is a list"),
     ("just words", "it is a str"), ("a: !!python/object:os.system {}", "not valid YAML: could not determine a cons")],
)  # fmt: skip
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml: ") as caught:
        load_config(Config, str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*b\.yaml"):
        load_config(Config, str(tmp_path / "b.yaml"))


def test_an_empty_file_lacks_its_keys(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir: this key is required \(and 4 more\)"):
        load_config(Config, str(tmp_path / "empty.yaml"))


def test_a_file_of_the_same_name_beats_a_shipped_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_path("quickstart") == SHIPPED / "configs" / "quickstart.yaml"
    (tmp_path / "quickstart").write_text(MINIMAL)
    assert load_config(Config, "quickstart").student.model == "s"


@pytest.mark.parametrize("path", sorted((SHIPPED / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_under_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # an installed package is not run from its checkout
    config = load_config(Config, path.stem)
    assert find_file(config.prompts.path, "prompts.path").exists()
    for name in (config.teacher.prompt.template, config.teacher.prompt.examples):
        assert name is None or find_file(name, "teacher.prompt").is_file()


def test_there_is_a_shipped_quickstart_that_needs_no_key() -> None:
    assert load_config(Config, "quickstart").sections("teacher")["teacher"]["provider"] == "local"


def test_the_resolved_config_can_be_fed_back(load: Load, tmp_path: Path) -> None:
    config = load(
        "--corpus", "c.duckdb", "--sft.trainer.learning_rate", "3e-5", "--sample.top_logprobs", "null",
        "--teacher.extra_body", "{a: {b: [1, ä]}, t: '1e5', y: 'yes', n: '12e3'}", "--prompts.limits", "{train: 3}",
    )  # fmt: skip
    with RunDir(tmp_path / "run") as run:
        run.save_config(config.model_dump(mode="json"))
    again = load_config(Config, str(tmp_path / "run" / "config.yaml"))
    assert again == config
    assert again.teacher.extra_body == {"a": {"b": [1, "ä"]}, "t": "1e5", "y": "yes", "n": "12e3"}


@pytest.mark.parametrize("path", sorted((SHIPPED / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_survives_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_config(Config, str(path))
    (tmp_path / "again.yaml").write_text(dump_config(config.model_dump(mode="json")), "utf-8")
    assert load_config(Config, str(tmp_path / "again.yaml")) == config
    assert yaml.safe_load((tmp_path / "again.yaml").read_text("utf-8"))["run_dir"] == str(config.run_dir)


def test_a_config_cannot_be_changed_by_the_stage_that_reads_it(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().sample.n = 5  # type: ignore[misc]


def test_sections_are_what_a_checkpoint_depends_on(load: Load) -> None:
    found = load("--seed", "7").sections("seed", "sft")
    assert found["seed"] == 7
    assert found["sft"] == {
        "soft_labels": True, "soft": {"alpha": 0.0, "beta": 0.0, "tail": "bucket"}, "allow_temperature_mismatch": False,
        "dev_fraction": 0.15, "early_stopping_patience": 1, "trainer": {},
    }  # fmt: skip


def test_text_of_another_temperature_than_its_soft_labels_has_to_be_asked_for(load: Load) -> None:
    for drawn in (("--sample.temperature", "0.7"), ("--sample.top_p", "0.9")):
        with pytest.raises(ConfigError, match=r"sft.soft_labels: .* at (0.7 and 1|1 and 0.9); set sft.soft_labels"):
            load(*drawn)
        assert load(*drawn, "--sft.soft_labels", "false").sample.draws == 1
        assert load(*drawn, "--sft.allow_temperature_mismatch", "true").sample.draws == 1
        assert load(*drawn, "--sample.top_logprobs", "null").sample.draws == 1


def test_a_loss_that_is_not_least_at_the_teacher_is_a_mistake(load: Load) -> None:
    said = complaint(load, more="sft: {soft: {beta: 1, tail: none}}")
    assert said.startswith("sft.soft: beta 1 with tail none is least at")
    for beta, tail in ((1, "bucket"), (1, "renormalise"), (0.9, "none")):
        assert load(more=f"sft: {{soft: {{beta: {beta}, tail: {tail}}}}}").sft.soft.tail == tail


def test_every_key_has_one_line_of_help_with_its_default() -> None:
    lines = dict(walk(Config))
    assert len(lines) == len(list(walk(Config)))
    assert lines["sample.n"] == "Answers per prompt. [default 1]"
    assert lines["student.model"].endswith("[required]")
    assert {"teacher.gguf", "teacher.base_url", "teacher.price.input", "onpolicy.algorithm.mode"} <= set(lines)
    assert not any("\n" in line for line in lines.values())
    assert lines["onpolicy.algorithm.mode"] == "relabel: [rewrite, afresh; default 'rewrite']"


def test_a_key_of_several_choices_is_explained_for_each() -> None:
    lines = dict(walk(Config))
    assert lines["teacher.provider"] == "One of openai, local, scripted. [required]"
    assert lines["teacher.give_up_s"].count("[default") == 1  # all say the same
    parts = lines["teacher.concurrency"].split(" | ")
    assert [part.partition(":")[0] for part in parts] == ["openai", "local", "scripted"]
    assert [part.rpartition(" ")[2] for part in parts] == ["128]", "4]", "8]"]


def test_validate_names_its_source() -> None:
    data: dict[str, Any] = yaml.safe_load(MINIMAL) | {"seed": "x"}
    with pytest.raises(ConfigError, match=r"^the test: seed: "):
        validate(Config, data, "the test")


def test_a_path_is_taken_as_given_before_anything_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("data/action_items", "x").resolve() == (SHIPPED.parent / "data/action_items").resolve()
    (tmp_path / "data/action_items").mkdir(parents=True)
    assert find_file("data/action_items", "x").resolve() == tmp_path / "data/action_items"
    (tmp_path / "yaml:odd").write_text("")
    assert find_file("yaml:odd", "x") == Path("yaml:odd")


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "f").write_text("")
    assert find_file("~/f", "x") == tmp_path / "f"


def test_package_colon_file_is_a_file_that_a_python_package_carries() -> None:
    assert find_file("blackbox_kd:configs/quickstart.yaml", "x") == SHIPPED / "configs" / "quickstart.yaml"
    assert find_file("blackbox_kd.corpus:schema.sql", "x") == SHIPPED / "corpus" / "schema.sql"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no/such/file", "what: no such file or folder 'no/such/file'"),
        ("blackbox_kd:nothing.gguf", "what: no such file or folder 'blackbox_kd:nothing.gguf'"),
        ("no_package:f.gguf", "what 'no_package:f.gguf': Python package 'no_package' is not installed"),
        ("no_package.sub:f.gguf", "what 'no_package.sub:f.gguf': Python package 'no_package.sub' is not installed"),
    ],
)
def test_a_file_that_is_not_there_is_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_file(name, "what")
    assert str(caught.value).startswith(said)

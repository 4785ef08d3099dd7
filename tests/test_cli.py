"""The command line: quick help, and one line for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blackbox_kd.__main__ import COMMANDS, main
from tests.conftest import RUN_ID


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from blackbox_kd.__main__ import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'duckdb', 'pydantic', 'aiohttp')))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"blackbox-kd {command}" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["sample", "sft", "onpolicy", "evaluate", "run"])
def test_every_stage_is_a_script(module: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", f"blackbox_kd.{module}", "--help"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0
    assert "--onpolicy.rounds" in shown.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


MISTAKES: list[tuple[list[str], int, str]] = [
    (["smaple"], 2, "did you mean 'sample'?"),
    (["sample", "--config", "quikstart"], 2, "no file 'quikstart'; shipped configs are"),
    (["sample", "--config", "P", "--sample.max_prompt", "3"], 2, "did you mean 'sample.max_prompts'?"),
    (["sample", "--config", "P", "--sample.n", "none"], 2, "sample.n: should be a valid integer"),
    (["sample", "--config", "P", "--sample.n", "0"], 2, "sample.n: should be greater than or equal to 1, it is 0"),
    (["sample", "--config", "P", "--sample.n"], 2, "--sample.n needs a value"),
    (["sample", "--config", "P", "extra"], 2, "what is 'extra'?"),
    (["sample", "--config", "P", "--prompts.path", "nowhere"], 2, "prompts.path: no such file or folder 'nowhere'"),
    (["sample", "--config", "P", "--teacher.provider", "opanai"], 2, "'opanai' is none of openai, local, scripted"),
    (["run", "--config", "P", "--onpolicy.algorithm.name", "relable"], 2, "onpolicy.algorithm.name"),
    (["run", "--config", "P", "--onpolicy.algorithm.template", "no.j2"], 2, "no such file or folder 'no.j2'"),
    (["run", "--config", "P", "--student.model", "no/such-model"], 2, "'no/such-model' cannot be loaded"),
    (["run", "--config", "P", "--student.model", "missing.gguf"], 2, "no such file or folder 'missing.gguf'"),
    (["run", "--config", "P", "--sft.trainer.learning_rat", "1"], 2, "sft.trainer: "),
    (["serve-teacher", "--config", "P"], 2, "needs teacher.provider local"),
    (["sql", "select 1", "--corpus", "none.duckdb"], 2, "no corpus 'none.duckdb'"),
    (["export-corpus", "--out", "x", "--corpus", "none.duckdb"], 2, "no corpus 'none.duckdb'"),
]


@pytest.mark.parametrize(("argv", "code", "said"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_one_line_and_nothing_is_asked(
    argv: list[str], code: int, said: str, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(project_file) if a == "P" else a for a in argv]
    assert main(argv) == code
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def hosted(project_file: Path, **teacher: Any) -> list[str]:
    settings = {"provider": "openai", "model": "m", "api_key_env": "SOME_API_KEY", **teacher}
    return ["run", "--config", str(project_file), "--teacher", json.dumps(settings)]


def test_a_missing_key_names_its_variable(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(hosted(project_file)) == 2
    assert "environment variable SOME_API_KEY is not set" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_code_3(
    project_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "k")
    assert main(hosted(project_file, base_url="http://127.0.0.1:9/v1")) == 3
    assert "no teacher answers at http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_a_corrupt_line_is_named(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = project_file.parent / "data" / "train.jsonl"
    train.write_text(train.read_text() + '{"prompt": "half\n')
    assert main(["sample", "--config", str(project_file)]) == 2
    assert f"{train}:13: not valid JSON" in capsys.readouterr().err


def test_a_second_process_on_the_same_run_is_refused(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from blackbox_kd.run_dir import RunDir

    with RunDir(project_file.parent / "run"):
        assert main(["sample", "--config", str(project_file)]) == 2
    assert "is in use by another run" in capsys.readouterr().err


def test_debug_shows_the_traceback(project_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--config", str(project_file), "--debug", "--prompts.path", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["sample"], ["run", "--config", "x", "--json=true"], ["sql", "--nope", "select 1"]])
def test_what_argparse_finds_is_one_line_too(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sft.trainer.num_train_epochs", "many"], "sft.trainer.num_train_epochs: should be a number"),
        (["--sft.trainer.output_dir", "x"], "set run_dir"),
        (["--student.max_length", "12"], "is left to train on"),
        (["--student.device", "toaster"], "student.device"),
    ],
)
def test_settings_that_cannot_train_are_one_line(
    flags: list[str], said: str, project_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "--config", str(project_file)]) == 0
    capsys.readouterr()
    assert main(["sft", "--config", str(project_file), *flags]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_wrong_sql_is_one_line(
    write_jsonl: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from blackbox_kd.corpus import Corpus

    corpus = Corpus(tmp_path / "c.duckdb")
    assert corpus.spend(RUN_ID)["calls"] == 0
    assert main(["sql", "selec 1", "--corpus", str(tmp_path / "c.duckdb")]) == 2
    assert "syntax error" in capsys.readouterr().err.lower()


def test_the_corpus_of_a_run_whose_config_does_not_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from blackbox_kd.corpus import Corpus

    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs" / "mine"
    run_dir.mkdir(parents=True)
    for text in ("seed: 1", "corpus: null", ""):
        (run_dir / "config.yaml").write_text(text)
        assert main(["sql", "select 42"]) == 2
        assert "config.yaml names no corpus: name one with --corpus FILE" in capsys.readouterr().err
    Corpus(run_dir / "corpus.duckdb")
    assert main(["sql", "select 42"]) == 0
    assert "42" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from blackbox_kd.corpus import Corpus

    Corpus(tmp_path / "c.duckdb")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert main(["export-corpus", "--out", str(out), "--corpus", str(tmp_path / "c.duckdb")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: --out {out}: Not a directory"

"""Stage `sample` from its YAML to its exit code, killed and interrupted on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from blackbox_kd import sample
from blackbox_kd.command import stage_main
from blackbox_kd.corpus import Corpus
from blackbox_kd.hashing import draw_seed
from tests.fakes import FakeAPI, chat_reply, error_reply, served, unused_port

SECRET = "sk-this-must-not-be-written-anywhere-0123456789"


def write_prompts(folder: Path, train: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": train, "heldout": 2}.items():
        rows = [{"messages": [{"role": "user", "content": f"{split} {i}"}]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_config(tmp_path: Path, url: str | None, name: str = "run", **sections: dict[str, Any]) -> str:
    """A project with four train prompts whose teacher is at `url` (None: scripted); `sections` are laid over it."""
    if not (tmp_path / "prompts").exists():
        write_prompts(tmp_path / "prompts")
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / name),
        "corpus": str(tmp_path / "corpus.duckdb"),
        "prompts": {"path": str(tmp_path / "prompts")},
        "teacher": {"provider": "openai", "model": "m", "base_url": url, "api_key_env": None, "max_retries": 1}
        if url
        else {"provider": "scripted"},
        "sample": {"max_completion_length": 9, "top_logprobs": None},
        "student": {"model": "no/such-student"},
        "onpolicy": {"algorithm": {"name": "relabel"}},
    }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    return str(path)


def corpus_of(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path / "corpus.duckdb")


def answers(tmp_path: Path) -> list[tuple[str, int]]:
    """(text, sample_idx) of each answer."""
    return corpus_of(tmp_path).rows(
        "SELECT c.text, r.sample_idx FROM completions c JOIN requests r USING (request_key) ORDER BY ALL"
    )


def train(count: int, draws: int = 1) -> list[tuple[str, int]]:
    return sorted((f"echo train {i}", draw) for i in range(count) for draw in range(draws))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_stage_asks_each_train_prompt_and_prints_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeAPI()) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url), "--json"]) == 0
    assert answers(tmp_path) == train(4)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {
        "questions": 4,
        "cached": 0,
        "answers": 4,
        "finish_reason": {"stop": 4},
        "missing_logprobs": 0,
        "spend": {"calls": 4, "prompt_tokens": 28, "completion_tokens": 12, "cost_usd": None, "unknown_calls": 0},
    }
    assert "0 of 4 questions were answered before, 4 new answers (4 stop)" in shown.err
    assert sorted(api.bodies, key=str)[0] == {
        "model": "m", "messages": [{"role": "user", "content": "train 0"}], "temperature": 1.0, "top_p": 1.0,
        "max_tokens": 9, "seed": draw_seed(0, [{"role": "user", "content": "train 0"}], 0),
    }  # fmt: skip
    corpus = corpus_of(tmp_path)
    assert corpus.rows("SELECT split, count(*) FROM prompts GROUP BY ALL ORDER BY ALL") == [
        ("heldout", 2),
        ("train", 4),
    ]
    assert corpus.rows("SELECT count(*) FROM sft") == [(4,)]


def test_without_json_nothing_is_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, None)
    assert sample.main(["--config", config]) == 0
    assert capsys.readouterr().out == ""
    assert answers(tmp_path) == sorted((f"You said: train {i}", 0) for i in range(4))


def test_a_second_run_asks_nothing_and_reports_the_same_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url)
        outputs = []
        for _ in range(2):
            assert sample.main(["--config", config, "--json"]) == 0
            outputs.append(json.loads(capsys.readouterr().out))
        assert (len(api.bodies), api.models_asked) == (4, 1)
    first, second = outputs
    assert (first["answers"], first["cached"], second["answers"], second["cached"]) == (4, 0, 4, 4)
    assert first["spend"] == second["spend"]


def test_another_run_address_and_template_name_over_the_same_corpus_asks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.j2", tmp_path / "new.j2"
    old.write_text("Be brief.")
    new.write_text("Be brief.")
    with served(FakeAPI()) as api:
        first = write_config(tmp_path, api.url, "first", teacher={"prompt": {"template": str(old)}})
        assert sample.main(["--config", first]) == 0
    gone = f"http://127.0.0.1:{unused_port()}/v1"
    second = write_config(tmp_path, gone, "second", teacher={"prompt": {"template": str(new)}})
    assert sample.main(["--config", second, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answers"], summary["spend"]["calls"]) == (4, 0)
    assert len({body["messages"][0]["content"] for body in api.bodies}) == 1
    assert corpus_of(tmp_path).rows("SELECT count(DISTINCT run_id) FROM runs") == [(2,)]


def test_several_draws_have_their_own_number_and_seed_and_more_of_them_ask_only_what_is_new(tmp_path: Path) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, teacher={"seed": 100})
        assert sample.main(["--config", config]) == 0
        assert sample.main(["--config", config, "--sample.n", "3"]) == 0
    assert answers(tmp_path) == train(4, draws=3)
    assert len(api.bodies) == 12
    assert {(body["messages"][0]["content"], body["seed"]) for body in api.bodies} == {
        (f"train {i}", draw_seed(100, [{"role": "user", "content": f"train {i}"}], draw))
        for i in range(4) for draw in range(3)
    }  # fmt: skip


def test_without_a_seed_several_draws_are_still_several_questions(tmp_path: Path) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, teacher={"seed": None}, sample={"n": 2})
        assert sample.main(["--config", config]) == 0
    assert answers(tmp_path) == train(4, draws=2)
    assert not any("seed" in body for body in api.bodies)


def test_at_temperature_0_there_is_one_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, sample={"n": 3, "temperature": 0})
        assert sample.main(["--config", config]) == 0
    assert answers(tmp_path) == train(4)
    assert [body["temperature"] for body in api.bodies] == [0] * 4
    assert "0 of 4 questions were answered before, 4 new" in last_line(capsys)


def test_max_prompts_takes_the_first_and_a_flag_beats_the_file(tmp_path: Path) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, sample={"max_prompts": 1})
        assert sample.main(["--config", config, "--sample.max_prompts=2", "--teacher.model", "other"]) == 0
    assert sorted(api.asked) == ["train 0", "train 1"]
    assert {body["model"] for body in api.bodies} == {"other"}


def test_answers_that_did_not_stop_are_counted_and_kept_out_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def some_cut(body: dict[str, Any], _: Any) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        return chat_reply(text, finish_reason="length" if text == "train 1" else "stop")

    with served(FakeAPI(some_cut)) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == {"stop": 3, "length": 1}
    assert corpus_of(tmp_path).rows("SELECT text FROM sft ORDER BY text") == [("train 0",), ("train 2",), ("train 3",)]


def test_the_resolved_config_repeats_the_run(tmp_path: Path) -> None:
    with served(FakeAPI()) as api:
        assert sample.main(["--config", write_config(tmp_path, api.url), "--sample.n", "2"]) == 0
        resolved = tmp_path / "run" / "config.yaml"
        before = resolved.read_text()
        assert sample.main(["--config", str(resolved)]) == 0
        assert len(api.bodies) == 8
    assert resolved.read_text() == before


def test_a_missing_key_is_exit_2_with_one_line_that_names_the_variable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, teacher={"api_key_env": "MY_TEACHER_KEY"})
        assert sample.main(["--config", config]) == 2
        assert api.models_asked == 0
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert "MY_TEACHER_KEY" in line
    assert not (tmp_path / "corpus.duckdb").exists()


def test_a_missing_template_is_exit_2_and_the_run_directory_stays_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "private.md.j2"
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, teacher={"prompt": {"template": str(template)}})
        assert sample.main(["--config", config]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: teacher.prompt.template")
        assert str(template) in line
        template.write_text("Be brief.")
        assert sample.main(["--config", config]) == 0
    assert len(api.bodies) == 4


def test_a_refusal_is_exit_3_and_what_came_before_it_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_then_401(body: dict[str, Any], _: Any) -> Any:
        return chat_reply("echo " + api.asked[-1]) if len(api.bodies) <= 2 else error_reply(401, "expired")

    with served(FakeAPI(two_then_401)) as api:
        config = write_config(tmp_path, api.url, teacher={"concurrency": 1})
        assert sample.main(["--config", config]) == 3
    assert len(api.bodies) == 3
    assert len(answers(tmp_path)) == 2
    assert last_line(capsys) == "error: the teacher refuses for good, HTTP 401: expired"


def test_nobody_at_the_address_is_exit_3_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{unused_port()}/v1"
    assert sample.main(["--config", write_config(tmp_path, url)]) == 3
    line = last_line(capsys)
    assert line.startswith("error: ")
    assert url in line


def test_debug_shows_the_traceback_of_the_same_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, f"http://127.0.0.1:{unused_port()}/v1")
    assert sample.main(["--config", config, "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_dead_letter_does_not_fail_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rejects_one(body: dict[str, Any], _: Any) -> Any:
        text = body["messages"][-1]["content"]
        return error_reply(400, "context exceeded") if text == "train 2" else chat_reply(text)

    with served(FakeAPI(rejects_one)) as api:
        config = write_config(tmp_path, api.url)
        assert sample.main(["--config", config, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answers"] == 3
        assert sample.main(["--config", config]) == 0
        assert len(api.bodies) == 4
    assert "1 in dead_letters" in capsys.readouterr().err


def test_the_key_is_nowhere_on_disk_nor_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TEACHER_KEY", SECRET)
    with served(FakeAPI(key=SECRET)) as api:
        config = write_config(tmp_path, api.url, teacher={"api_key_env": "MY_TEACHER_KEY"})
        assert sample.main(["--config", config, "--json"]) == 0
        assert len(answers(tmp_path)) == 4
        monkeypatch.setenv("MY_TEACHER_KEY", SECRET + "-expired")
        assert sample.main(["--config", config, "--sample.n", "2"]) == 3
    assert SECRET not in "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"corpus.duckdb", "config.yaml", "run.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in str(corpus_of(tmp_path).rows("SELECT config FROM runs"))


def test_any_stage_runs_through_the_same_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def look(project: Any) -> dict[str, Any]:
        return {"train": len(list(project.sampled_prompts)), "model": project.teacher.config.model}

    config = write_config(tmp_path, "http://127.0.0.1:1/v1")
    assert stage_main("look", "Look.", look, ["--config", config, "--json", "--sample.max_prompts", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"train": 3, "model": "m"}


# In a process of its own


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blackbox_kd", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_sampling_never_imports_torch(tmp_path: Path) -> None:
    code = """
import sys
import blackbox_kd.sample
assert "torch" not in sys.modules, "after import"
assert blackbox_kd.sample.main(["--config", sys.argv[1]]) == 0
assert "torch" not in sys.modules, "after the run"
assert "transformers" not in sys.modules
"""
    with served(FakeAPI()) as api:
        config = write_config(tmp_path, api.url, sample={"top_logprobs": 2})
        done = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == train(4)


def test_a_killed_run_goes_on_and_only_what_was_in_flight_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total, concurrency = 24, 4
    write_prompts(tmp_path / "prompts", train=total)
    with served(FakeAPI(delay_s=0.15)) as api:
        config = write_config(tmp_path, api.url, teacher={"concurrency": concurrency})
        with start("sample", "--config", config) as process:
            wait_for(lambda: len(api.bodies) >= 10, process)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        asked_before = len(api.bodies)
        assert asked_before < total
        api.delay_s = 0
        assert sample.main(["--config", config, "--json"]) == 0
    spend = json.loads(capsys.readouterr().out)["spend"]
    assert answers(tmp_path) == train(total)
    again = len(api.bodies) - total
    assert len(set(api.asked)) == total
    ((lost,),) = corpus_of(tmp_path).rows("SELECT count(*) FROM attempts WHERE billed IS NULL")
    # A call can be noted and die before it is sent, so fewer may have arrived twice than are counted as lost.
    assert 1 <= again <= lost <= concurrency
    assert (spend["calls"], spend["unknown_calls"]) == (total, lost)
    assert not list((tmp_path / "corpus.duckdb.journal").glob("*.journal"))


def test_ctrl_c_keeps_what_is_in_flight_and_exits_with_130(tmp_path: Path) -> None:
    total, concurrency = 24, 4
    write_prompts(tmp_path / "prompts", train=total)
    with served(FakeAPI(delay_s=0.3)) as api:
        config = write_config(tmp_path, api.url, teacher={"concurrency": concurrency})
        with start("sample", "--config", config) as process:
            wait_for(lambda: len(api.bodies) >= 6 and api.in_flight == concurrency, process)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert err.strip().splitlines()[-1].startswith("interrupted; what was received is kept")
        asked = len(api.bodies)
        assert asked < total
        assert len(answers(tmp_path)) == asked
        api.delay_s = 0
        assert sample.main(["--config", config]) == 0
    assert answers(tmp_path) == train(total)
    assert len(api.bodies) == total
    assert corpus_of(tmp_path).rows("SELECT count(*) FROM attempts WHERE billed IS NOT true") == [(0,)]

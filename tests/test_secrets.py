"""A key that is pasted into the environment is on no disk and no screen, at no moment of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from blackbox_kd import sample
from tests.fake_batch import Ending, FakeBatchAPI, Line, answer, rejection
from tests.fakes import Answer, FakeAPI, chat_reply, error_reply, served
from tests.test_sample import corpus_of, write_config, write_prompts

SECRET = "sk-this-must-not-be-written-anywhere-0123456789"
KEY = {"api_key_env": "MY_TEACHER_KEY"}
BOTH = pytest.mark.parametrize("transport", ["fast", "openai"])


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people paste it, with a line end."""
    monkeypatch.setenv("MY_TEACHER_KEY", SECRET + "\n")


def told(folder: Path) -> list[str]:
    """Files in which the key is, right now."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if SECRET.encode() in path.read_bytes()]


def corpus_text(tmp_path: Path) -> str:
    """DuckDB may compress what it stores."""
    corpus = corpus_of(tmp_path)
    tables = [name for (name,) in corpus.rows("SELECT table_name FROM duckdb_tables()")]
    return str([corpus.rows(f"SELECT COLUMNS(*)::VARCHAR FROM {table}") for table in tables])


@BOTH
def test_an_endpoint_that_repeats_the_key_in_all_it_says_does_not_get_it_written(
    tmp_path: Path, transport: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path / "prompts", train=9)
    seen: list[str] = []
    beats: list[bytes] = []

    def tells(body: dict[str, Any], request: web.Request) -> Answer:
        seen.extend(told(tmp_path))
        beats.extend(path.read_bytes() for path in tmp_path.rglob("*.status.json"))
        number, said = len(api.bodies), f"caller {request.headers['authorization']} is odd"
        return chat_reply(said) if number < 3 else error_reply({3: 500, 4: 400, 5: 429}.get(number, 401), said, SECRET)

    with served(FakeAPI(tells, key=SECRET, delay_s=0.15)) as api:
        teacher = KEY | {"transport": transport, "concurrency": 1, "max_retries": 3}
        arguments = ["--config", write_config(tmp_path, api.url, teacher=teacher), "--json", "--debug"]
        assert sample.main(arguments) == 3
    out, err = capfd.readouterr()
    assert "the teacher refuses for good, HTTP 401: caller Bearer *** is odd" in err
    assert any(b"is odd" in beat for beat in beats)
    assert corpus_text(tmp_path).count("is odd") >= 6
    assert (seen, told(tmp_path)) == ([], [])
    for text in (out, err, corpus_text(tmp_path)):
        assert SECRET not in text


@BOTH
def test_an_endpoint_that_says_which_key_it_does_not_like_is_not_quoted(
    tmp_path: Path, transport: str, capfd: pytest.CaptureFixture[str]
) -> None:
    refusing = FakeAPI(models_reply=lambda: error_reply(401, f"Incorrect API key provided: {SECRET}"))
    with served(refusing) as api:
        path = write_config(tmp_path, api.url, teacher=KEY | {"transport": transport})
        assert sample.main(["--config", path, "--debug"]) == 3
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == f"error: {api.url} does not accept the key: HTTP 401"
    assert "Traceback" in err
    assert SECRET not in err
    assert told(tmp_path) == []


def test_the_records_of_a_batch_are_without_it_while_it_is_under_way_and_after_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    ledgers: list[str] = []

    class Watched(FakeBatchAPI):
        async def content(self, request: web.Request) -> web.Response:
            ledgers.extend(path.name for path in (tmp_path / "corpus.duckdb.batches").glob("*.json"))
            seen.extend(told(tmp_path))
            return await super().content(request)

    def repeats(lines: list[Line]) -> Ending:
        good = [answer(line, body=chat_reply(f"your key {SECRET}")) for line in lines[:2]]
        return "completed", good, [rejection(line, 400, f"not with {SECRET}") for line in lines[2:]]

    with served(Watched(repeats, key=SECRET)) as api:
        batch = {"batch": True, "batch_poll_s": 0.02}
        path = write_config(tmp_path, api.url, teacher=KEY, sample=batch)
        assert sample.main(["--config", path, "--debug"]) == 0
    assert ledgers
    assert corpus_text(tmp_path).count("your key ***") == 2
    assert corpus_text(tmp_path).count("not with ***") >= 2
    assert (seen, told(tmp_path)) == ([], [])
    assert SECRET not in "".join(capfd.readouterr()) + corpus_text(tmp_path)


@BOTH
@pytest.mark.parametrize("written", ["Bearer $MY_TEACHER_KEY", "Bearer ${MY_TEACHER_KEY}"])
def test_an_endpoint_that_repeats_the_key_out_of_a_header_does_not_get_it_written(
    tmp_path: Path, transport: str, written: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def tells(body: dict[str, Any], request: web.Request) -> Answer:
        return error_reply(400, f"no such key: {request.headers['authorization'].removeprefix('Bearer ')}")

    with served(FakeAPI(tells, key=SECRET)) as api:
        teacher = {"transport": transport, "extra_headers": {"Authorization": written}}
        assert sample.main(["--config", write_config(tmp_path, api.url, teacher=teacher), "--debug"]) == 3
    assert len(api.bodies) == 4
    assert corpus_text(tmp_path).count("no such key: ***") >= 2 * 4
    assert told(tmp_path) == []
    assert SECRET not in "".join(capfd.readouterr()) + corpus_text(tmp_path)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (
            {"extra_headers": {"X-Key": "Bearer $NOT_SET"}},
            "extra_headers.X-Key: environment variable NOT_SET is not",
        ),
        ({"client_options": {"api_key": "${NOT_SET}"}}, "client_options.api_key: environment variable NOT_SET is not"),
        ({"extra_headers": {"X-Key": "$ODD_KEY"}}, "extra_headers.X-Key: its value holds a character"),
        ({"client_options": {"api_key": "$ODD_KEY"}}, "client_options.api_key: its value holds a character"),
        ({"api_key_env": "ODD_KEY"}, "the key in that variable holds a character"),
        ({"api_key_env": SECRET}, "teacher.api_key_env is the name of an environment variable, not the key itself"),
        ({"base_url": f"http://127.0.0.1:9/v1?api-version=1&api-key={SECRET}"}, "in its parameter 'api-key'"),
        ({"base_url": f"http://127.0.0.1:9/v1?sig={SECRET}"}, "in its parameter 'sig'"),
    ],
)
@pytest.mark.parametrize("odd", ["\u201c", "\n"])
def test_a_key_that_cannot_be_sent_is_one_line_that_does_not_quote_it(
    tmp_path: Path,
    teacher: dict[str, Any],
    said: str,
    odd: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ODD_KEY", f"{SECRET}{odd}{SECRET}")
    path = write_config(tmp_path, "http://127.0.0.1:9/v1", teacher=teacher)
    assert sample.main(["--config", path]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert said in line
    assert SECRET not in line
    assert told(tmp_path) == ["run.yaml"] * (SECRET in str(teacher))


def test_a_section_that_is_a_key_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, "http://127.0.0.1:9/v1", teacher={"extra_headers": SECRET})
    assert sample.main(["--config", path, "--debug"]) == 2
    err = capfd.readouterr().err
    assert "teacher.extra_headers: should be a section with keys of its own, it is a str" in err
    assert "Traceback" in err
    assert SECRET not in err

"""The corpus: every row once, every number as worked out by hand, and a file that others may hold."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pytest

from blackbox_kd.corpus import Corpus, export, query
from blackbox_kd.corpus.journal import Answered, Record, Segment
from blackbox_kd.corpus.logprobs import Vocabs
from blackbox_kd.errors import CorpusBusy, CorpusError
from blackbox_kd.hashing import content_id
from blackbox_kd.types import Completion, Feedback, Request, Scores, TokenLogprob, TopLogprob, scorer
from tests.conftest import RUN_ID
from tests.records import (
    CONTEXT,
    answered,
    attempt,
    completion,
    held_open,
    let_go,
    prompt,
    request,
    sent,
    token,
    usage,
)

LN2 = math.log(2)
SCHEMA = resources.files("blackbox_kd.corpus").joinpath("schema.sql").read_text("utf-8")
OTHER_RUN = "00000000-0000-4000-8000-000000000002"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Corpus(tmp_path_factory.mktemp("empty") / "corpus.duckdb").path


@pytest.fixture
def corpus(tmp_path: Path, empty: Path) -> Corpus:
    """A copy of an empty corpus: half the time of a new one."""
    return Corpus(Path(shutil.copy(empty, tmp_path / "corpus.duckdb")), lock_wait_s=5.0)


def store(corpus: Corpus, *completions: Completion, asked: list[Request] | None = None, **changes: Any) -> None:
    """Ask the requests (or the plain one) and ingest the answers."""
    corpus.add_requests(asked or [request()])
    assert corpus.try_ingest([answered(*completions, **changes)])


def abandon(corpus: Corpus, *records: Record) -> None:
    """A process wrote these to its journal and died."""
    segment = Segment(corpus.journal)
    for record in records:
        segment.append(record)
    segment.close(ingested=False)


def stored(corpus: Corpus, table: str) -> int:
    return int(corpus.rows(f"SELECT count(*) FROM {table}")[0][0])


def everything(corpus: Corpus) -> dict[str, list[tuple[Any, ...]]]:
    with corpus.connect() as con:
        tables = [name for (name,) in con.execute("SELECT table_name FROM duckdb_tables() ORDER BY ALL").fetchall()]
        return {name: con.execute(f"SELECT {name}::VARCHAR FROM {name} ORDER BY ALL").fetchall() for name in tables}


# --- what is ingested


def test_what_is_asked_inside_a_block_shares_its_connection(corpus: Corpus) -> None:
    with corpus.connect() as outer:
        with corpus.connect() as inner:
            assert inner is outer
        corpus.add_requests([request()])
        assert stored(corpus, "requests") == 1  # the block is still open
        held = subprocess.run([sys.executable, "-c", OPEN, corpus.path], capture_output=True, text=True)
        assert "Could not set lock" in held.stderr
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(_connection(corpus)))
        thread.start()
        thread.join()
        assert found != [outer]
    assert subprocess.run([sys.executable, "-c", OPEN, corpus.path], capture_output=True).returncode == 0
    assert stored(corpus, "requests") == 1


def test_a_block_that_fails_leaves_nothing_open(corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="no_such_table"), corpus.connect():
        corpus.rows("SELECT * FROM no_such_table")
    assert subprocess.run([sys.executable, "-c", OPEN, corpus.path], capture_output=True).returncode == 0
    assert stored(corpus, "requests") == 0


def test_what_fails_inside_a_block_is_said_there_and_leaves_no_half_of_a_transaction(corpus: Corpus) -> None:
    corpus.add_requests([request()])
    broken = completion(author="student", choice_idx=1, prompt_id="no uuid")
    with corpus.connect():
        with pytest.raises(CorpusError, match=r"corpus\.duckdb: "):
            corpus.add_completions([completion(author="student"), broken], scorer="m@p", run_id=RUN_ID)
        assert stored(corpus, "completions") == 0
        corpus.add_completions([completion(author="student")], scorer="m@p", run_id=RUN_ID)
    assert stored(corpus, "completions") == 1


OPEN = "import duckdb, sys; duckdb.connect(sys.argv[1]).close()"


def _connection(corpus: Corpus) -> object:
    with corpus.connect() as con:
        return con


def test_ingesting_twice_changes_nothing(corpus: Corpus) -> None:
    corpus.add_requests([request()])
    failed = Answered(attempt=attempt(status=400, billed=False, error="no"), dead_letter=True)
    records: list[Record] = [answered(completion(logprobs=[token("a", -1.0, ("a", -1.0))])), failed]
    corpus.try_ingest(records)
    before = everything(corpus)
    assert {name: len(rows) for name, rows in before.items() if rows} == {
        "meta": 1, "requests": 1, "attempts": 2, "completions": 1, "logprobs": 1, "vocab": 1, "dead_letters": 1,
    }  # fmt: skip
    corpus.try_ingest(records)
    corpus.try_ingest(records + records)
    assert everything(corpus) == before


def test_prompts_and_requests_that_are_there_stay_as_they_were(corpus: Corpus) -> None:
    corpus.add_prompts([prompt(split="train"), prompt(split="train")])
    corpus.add_prompts([prompt(split="ood", meta={"n": 1}), prompt("Ho")])
    assert corpus.rows("SELECT split, count(*) FROM prompts GROUP BY ALL") == [("train", 2)]
    corpus.add_requests([request(), request()])
    corpus.add_requests([request(purpose="evaluate"), request(sample_idx=1)])
    assert corpus.rows("SELECT purpose, sample_idx FROM requests ORDER BY ALL") == [("sample", 0), ("sample", 1)]


def test_a_prompt_that_is_trained_on_is_a_train_prompt_whatever_it_was_before(corpus: Corpus) -> None:
    corpus.add_prompts([prompt(split="holdback", meta={"n": 1}), prompt("Ho", split="ood")])
    corpus.add_prompts([prompt(split="train")])
    assert corpus.rows("SELECT split, meta::VARCHAR FROM prompts ORDER BY split") == [
        ("ood", "{}"), ("train", '{"n":1}'),
    ]  # fmt: skip


def test_a_call_that_was_sent_and_never_answered_is_an_attempt_only_once_its_process_is_gone(corpus: Corpus) -> None:
    call = attempt()
    corpus.try_ingest([sent(call)])
    assert stored(corpus, "attempts") == 0
    abandon(corpus, sent(call))
    assert corpus.replay() == 0
    assert corpus.rows("SELECT attempt_id::VARCHAR, status, error, billed, cost_usd, prompt_tokens FROM attempts") == [
        (call.attempt_id, None, "in flight when the process died", None, None, 0),
    ]  # fmt: skip


def test_a_call_that_was_answered_is_no_lost_one(corpus: Corpus) -> None:
    answer = answered(usage=usage(7, 3), cost_usd=0.5)
    abandon(corpus, sent(answer.attempt), answer)
    assert corpus.replay() == 1
    assert corpus.rows("SELECT billed, cost_usd, epoch(attempted_at) FROM attempts") == [(True, 0.5, 1.7e9)]


def test_opening_a_corpus_replays_the_journal_and_clears_it(corpus: Corpus) -> None:
    corpus.add_requests([request()])
    abandon(corpus, answered(completion(text="first")))
    abandon(corpus, answered(completion(choice_idx=1, text="second")))
    again = Corpus(corpus.path)
    assert [c.text for c in again.answers([request().request_key])[request().request_key]] == ["first", "second"]
    assert list(corpus.journal.iterdir()) == []
    assert again.replay() == 0


def test_a_bad_record_leaves_no_part_of_itself_and_the_others_go_in(corpus: Corpus) -> None:
    bad = answered(completion(choice_idx=1, text="b", prompt_id="no uuid"))
    assert corpus.try_ingest([answered(), bad])
    assert corpus.refused == stored(corpus, "attempts") == stored(corpus, "completions") == 1


def test_a_disk_that_is_full_refuses_no_record(corpus: Corpus) -> None:
    code = "import sys, pathlib, resource; from blackbox_kd.corpus import Corpus; from tests.records import *; "
    code += "c = Corpus(pathlib.Path(sys.argv[1])); from blackbox_kd.errors import CorpusError\n"
    code += "many = [answered(completion(prompt_id=prompt(str(i)).prompt_id, text='long ' * 9999, choice_idx=i)) "
    code += "for i in range(99)]\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (c.path.stat().st_size + 9999, resource.RLIM_INFINITY))\n"
    code += "try: c.try_ingest(many)\nexcept CorpusError as error: print(c.refused, error)"
    done = subprocess.run([sys.executable, "-c", code, corpus.path], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("0 "), done
    assert not corpus.journal.exists() or not list(corpus.journal.iterdir())


def test_a_dead_letter_is_given_up_for_good(corpus: Corpus) -> None:
    corpus.add_requests([request()])
    key = request().request_key
    corpus.try_ingest([Answered(attempt=attempt(status=422, error="too long", billed=False), dead_letter=True)])
    assert corpus.settled([key, request(sample_idx=1).request_key]) == (set(), {key})
    assert corpus.rows("SELECT status, error, run_id::VARCHAR FROM dead_letters") == [(422, "too long", RUN_ID)]


# --- what comes back


def test_a_completion_comes_back_as_it_was(corpus: Corpus) -> None:
    full = completion(
        text="Grüße\x00 \U0001f600\u2028\n", reasoning="hm", finish_reason="length", served_model="m-2025",
        system_fingerprint="fp", usage=usage(11, 5, cached=4, reasoning=2), round=3, choice_idx=0,
        logprobs=[token("é", -0.5, ("é", -0.5), ("e", -1.25)), token("!", -2.0, ("?", -0.25), ("!", -2.0))],
    )  # fmt: skip
    plain = completion(choice_idx=1, text="plain")
    store(corpus, full, plain)
    assert corpus.answers([full.request_key]) == {full.request_key: [full, plain]}


def test_answers_are_those_that_were_asked_for_in_order_of_choice(corpus: Corpus) -> None:
    first, second, third = request(), request(sample_idx=1), request(sample_idx=2)
    corpus.add_requests([first, second, third])
    corpus.try_ingest([
        answered(completion(second, choice_idx=1, text="b"), completion(second, text="a")), answered(completion(third)),
    ])  # fmt: skip
    found = corpus.answers([first.request_key, second.request_key])
    assert {key: [c.text for c in choices] for key, choices in found.items()} == {second.request_key: ["a", "b"]}
    assert corpus.answers([]) == {}


def test_a_row_that_was_changed_by_hand_is_noticed(corpus: Corpus) -> None:
    store(corpus, completion())
    corpus.rows("UPDATE completions SET text = 'better'")
    with pytest.raises(CorpusError, match="does not hash to its id: the row was changed"):
        corpus.answers([request().request_key])


def test_the_students_own_samples_come_back_with_the_logprobs_of_their_policy(corpus: Corpus) -> None:
    drawn = request(purpose="rollout", context_hash=None, endpoint="generate")
    wrote = completion(drawn, author="student", policy="abc", logprobs=[token("a", -1.0, id=5)])
    corpus.add_requests([drawn])
    corpus.add_completions([wrote], scorer=scorer("m", "abc"), run_id=RUN_ID)
    corpus.add_completions([wrote], scorer=scorer("m", "abc"), run_id=RUN_ID)
    assert corpus.answers([drawn.request_key]) == {drawn.request_key: [wrote]}
    assert stored(corpus, "attempts") == 0


def test_of_several_scorers_a_completion_comes_back_with_its_authors(corpus: Corpus) -> None:
    own, others = completion(logprobs=[token("a", -1.0)]), completion(logprobs=[token("a", -3.0)])
    store(corpus, own)
    corpus.add_completions([others], scorer="m@another prompt", run_id=RUN_ID)
    assert corpus.rows("SELECT count(*) FROM logprobs") == [(2,)]
    assert corpus.answers([own.request_key])[own.request_key] == [own]


# --- logprobs


def logprobs_row(corpus: Corpus) -> dict[str, Any]:
    columns, [row] = query(corpus.path, "FROM logprobs")
    return dict(zip(columns, row, strict=True))


def test_flat_lists_hold_the_alternatives_row_by_row_with_gaps_where_fewer_were_shown(corpus: Corpus) -> None:
    store(corpus, completion(logprobs=[token("a", -LN2, ("a", -LN2), ("b", -2 * LN2)), token("c", -LN2, ("c", -LN2))]))
    row = logprobs_row(corpus)
    assert (row["k"], row["scorer"]) == (2, f"m@{CONTEXT}")
    assert row["token_ids"] == [-1, -2]  # a, c: the sampled tokens came first
    assert row["top_ids"] == [-1, -3, -2, None]
    assert row["token_logprobs"] == pytest.approx([-0.693, -0.693], abs=1e-6)
    assert row["top_logprobs"] == [pytest.approx(-0.693, abs=1e-6), pytest.approx(-1.386, abs=1e-6),
                                   pytest.approx(-0.693, abs=1e-6), None]  # fmt: skip
    # 1 - 1/2 - 1/4 and 1 - 1/2; from the rounded values it would be 0.24984 and 0.49993
    assert row["missing_mass"] == pytest.approx([0.25, 0.5], abs=1e-6)


def test_the_sentinel_of_an_endpoint_is_null_and_counts_as_no_mass(corpus: Corpus) -> None:
    hidden = token("z", -9999.0, ("a", -2 * LN2), ("b", -9999.0))
    store(corpus, completion(logprobs=[hidden]))
    row = logprobs_row(corpus)
    assert row["token_logprobs"] == [None]
    assert row["top_logprobs"] == [pytest.approx(-1.386, abs=1e-6), None]
    assert row["missing_mass"] == pytest.approx([0.75], abs=1e-6)
    [read] = corpus.answers([request().request_key])[request().request_key]
    assert read.logprobs is not None
    assert read.logprobs[0].logprob == -9999.0
    assert [t.logprob for t in read.logprobs[0].top_logprobs] == [pytest.approx(-1.386), -9999.0]


def test_missing_mass_is_never_below_zero(corpus: Corpus) -> None:
    store(corpus, completion(logprobs=[token("a", 0.0, ("a", 0.0), ("b", -1e-4))]))
    assert logprobs_row(corpus)["missing_mass"] == [0.0]


def test_without_alternatives_all_mass_is_missing(corpus: Corpus) -> None:
    store(corpus, completion(logprobs=[token("a", -1.0)]))
    row = logprobs_row(corpus)
    assert (row["k"], row["top_ids"], row["missing_mass"]) == (0, [], [1.0])


def test_tokens_without_ids_keep_their_invented_id_over_connections(corpus: Corpus) -> None:
    corpus.add_requests([request()])
    for choice, text in enumerate(["ab", "ba", "bc"]):
        again = Corpus(corpus.path)
        again.try_ingest([answered(completion(choice_idx=choice, text=text, logprobs=[token(t, -1.0) for t in text]))])
    assert corpus.rows("SELECT token_id, text, bytes FROM vocab ORDER BY token_id DESC") == [
        (-1, "a", b"a"), (-2, "b", b"b"), (-3, "c", b"c"),
    ]  # fmt: skip
    assert sorted(corpus.rows("SELECT token_ids FROM logprobs")) == [([-2, -3],), ([-2, -1],), ([-1, -2],)]


def test_the_same_text_with_other_bytes_is_another_token(corpus: Corpus) -> None:
    halves = [
        token("\ufffd", -1.0, bytes=[0xC3]),
        token("\ufffd", -1.0, bytes=[0xA9]),
        token("\ufffd", -1.0, bytes=None),
    ]
    store(corpus, completion(logprobs=halves))
    assert corpus.rows("SELECT bytes FROM vocab ORDER BY token_id DESC") == [(b"\xc3",), (b"\xa9",), (None,)]
    [read] = corpus.answers([request().request_key])[request().request_key]
    assert read.logprobs == halves


def test_ids_that_the_endpoint_gives_are_kept(corpus: Corpus) -> None:
    top = TopLogprob(token="b", logprob=-0.25, bytes=[98], id=11)
    drawn = TokenLogprob(token="a", logprob=-1.5, bytes=[97], id=7, top_logprobs=[top])
    store(corpus, completion(logprobs=[drawn, drawn]))
    assert corpus.rows("SELECT token_id, text FROM vocab ORDER BY ALL") == [(7, "a"), (11, "b")]
    assert logprobs_row(corpus)["top_ids"] == [11, 11]
    assert corpus.answers([request().request_key])[request().request_key][0].logprobs == [drawn, drawn]


def test_two_models_have_their_own_tokens(corpus: Corpus) -> None:
    other = request(body={"model": "n"})
    corpus.add_requests([request(), other])
    corpus.try_ingest([
        answered(completion(logprobs=[token("a", -1.0), token("b", -1.0)])),
        answered(completion(other, logprobs=[token("b", -1.0)]), scorer=f"n@{CONTEXT}"),
    ])  # fmt: skip
    assert corpus.rows("SELECT model, token_id, text FROM vocab ORDER BY model, token_id DESC") == [
        ("m", -1, "a"), ("m", -2, "b"), ("n", -1, "b"),
    ]  # fmt: skip


# --- money


def test_spend_is_what_was_ever_billed(corpus: Corpus) -> None:
    asked, judged = request(), request(purpose="judge", sample_idx=9)
    corpus.add_requests([asked, judged])
    corpus.try_ingest([
        answered(completion(asked), usage=usage(100, 20), cost_usd=0.5),
        answered(completion(judged), usage=usage(10, 2), cost_usd=0.25),
        Answered(attempt=attempt(asked, status=429, billed=False, error="slow down")),
        Answered(attempt=attempt(asked, status=None, billed=None, error="connection lost")),
        answered(completion(asked, choice_idx=1), run_id=OTHER_RUN, usage=usage(1, 1), cost_usd=8.0),
    ])  # fmt: skip
    assert corpus.spend(RUN_ID) == {
        "calls": 2, "prompt_tokens": 110, "completion_tokens": 22, "cost_usd": 0.75, "unknown_calls": 1,
    }  # fmt: skip
    columns = "purpose, model, calls, billed, unknown, rate_limited, prompt_tokens, completion_tokens, cost_usd"
    assert corpus.rows(f"SELECT {columns} FROM spend WHERE run_id = '{RUN_ID}' ORDER BY ALL") == [
        ("judge", "m", 1, 1, 0, 0, 10, 2, 0.25), ("sample", "m", 3, 1, 1, 1, 100, 20, 0.5),
    ]  # fmt: skip
    assert corpus.rows("SELECT sum(cost_usd) FROM spend") == [(8.75,)]


def test_a_price_that_is_not_known_makes_the_sum_unknown(corpus: Corpus) -> None:
    corpus.try_ingest([answered(cost_usd=0.5), answered(completion(text="b"), cost_usd=None)])
    assert corpus.spend(RUN_ID)["cost_usd"] is None
    assert corpus.spend(RUN_ID)["calls"] == 2


def test_a_call_that_cost_nothing_needs_no_price(corpus: Corpus) -> None:
    corpus.try_ingest([answered(cost_usd=0.0), Answered(attempt=attempt(status=500, billed=False))])
    assert corpus.spend(RUN_ID)["cost_usd"] == 0.0


def test_a_run_that_asked_nothing_has_spent_nothing(corpus: Corpus) -> None:
    assert corpus.spend(OTHER_RUN) == {
        "calls": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0, "unknown_calls": 0,
    }  # fmt: skip


# --- views


def test_pending_is_what_was_asked_and_neither_answered_nor_given_up(corpus: Corpus) -> None:
    asked = [request(sample_idx=i) for i in range(3)]
    corpus.add_requests(asked)
    dead = Answered(attempt=attempt(asked[1], status=400, error="no"), dead_letter=True)
    retried = Answered(attempt=attempt(asked[2], status=500, error="later"))
    corpus.try_ingest([answered(completion(asked[0])), dead, retried])
    assert corpus.rows("SELECT sample_idx FROM pending") == [(2,)]


def sampled(corpus: Corpus) -> None:
    """One usable teacher row, and one of each kind that is not."""
    train, held = prompt("Q"), prompt("H", split="heldout")
    corpus.add_prompts([train, held])
    good, cut, blank = (request(train, sample_idx=i) for i in range(3))
    elsewhere, relabel = request(held), request(train, purpose="relabel", sample_idx=8)
    other_context = request(train, sample_idx=5, context_hash=content_id("another prompt"))
    other_model = request(train, body={"model": "n"})
    corpus.add_requests([good, cut, blank, elsewhere, relabel, other_context, other_model])
    made = [
        completion(good, text="good"), completion(good, choice_idx=1, text="good too"),
        completion(cut, text="cut", finish_reason="length"), completion(blank, text=" \n"),
        completion(elsewhere, text="heldout"), completion(relabel, text="relabel"),
        completion(other_context, text="other context"), completion(other_model, text="other model"),
        completion(request(train, sample_idx=99), text="of no known request"),
    ]  # fmt: skip
    corpus.try_ingest([answered(c) for c in made])
    corpus.add_completions([completion(good, choice_idx=2, author="student", text="student")], scorer="", run_id=RUN_ID)


def test_teacher_rows_are_whole_answers_to_train_prompts(corpus: Corpus) -> None:
    sampled(corpus)
    assert corpus.rows("SELECT text, model, sample_idx, choice_idx, temperature FROM teacher_rows ORDER BY text") == [
        ("good", "m", 0, 0, 1.0), ("good too", "m", 0, 1, 1.0), ("other context", "m", 5, 0, 1.0),
        ("other model", "n", 0, 0, 1.0),
    ]  # fmt: skip
    assert corpus.rows("SELECT messages->>'$[0].content' FROM teacher_rows LIMIT 1") == [("Q",)]


def test_what_can_be_learnt_are_the_whole_answers_to_just_these_requests(corpus: Corpus) -> None:
    sampled(corpus)
    every = corpus.rows("SELECT request_key::VARCHAR, completion_id::VARCHAR, text FROM completions")
    (key,) = {row[0] for row in every if row[2] == "good"}
    found = corpus.whole_answers([key])
    expected = [row for row in every if row[0] == key and row[2] in ("good", "good too")]
    assert found == sorted(expected, key=lambda row: row[1])
    assert corpus.whole_answers([]) == []


def test_the_view_sft_follows_the_model_and_private_prompt_of_the_last_run(corpus: Corpus, tmp_path: Path) -> None:
    sampled(corpus)
    texts = "SELECT text FROM sft ORDER BY text"
    assert corpus.rows(texts) == []
    corpus.add_run(RUN_ID, tmp_path, {}, "m", CONTEXT)
    assert corpus.rows(texts) == [("good",), ("good too",)]
    corpus.add_run(OTHER_RUN, tmp_path, {}, "m", content_id("another prompt"))
    assert corpus.rows(texts) == [("other context",)]
    corpus.add_run(RUN_ID, tmp_path, {}, "n", CONTEXT)  # the first run starts again, with another teacher
    assert corpus.rows(texts) == [("other model",)]
    assert stored(corpus, "runs") == 2


def test_rollouts_and_pairs_show_what_the_student_wrote_and_what_became_of_it(corpus: Corpus) -> None:
    asked = prompt("Q")
    drawn = request(asked, purpose="rollout", endpoint="generate", context_hash=None)
    wrote = completion(drawn, author="student", policy="base", text="draft", round=2, usage=usage(3, 4))
    unused = completion(drawn, author="student", policy="base", text="other draft", choice_idx=1, round=2)
    rewrite = request(asked, purpose="relabel", completion_id=wrote.completion_id)
    better = completion(rewrite, text="better")
    corpus.add_prompts([asked])
    corpus.add_requests([drawn, rewrite])
    corpus.add_completions([wrote, unused], scorer="m@base", run_id=RUN_ID)
    corpus.try_ingest([answered(better)])
    chosen = better.completion_id
    said = [
        Feedback(completion_id=wrote.completion_id, kind="rewrite", scorer="m@x", target_completion_id=chosen),
        Feedback(completion_id=unused.completion_id, kind="grade", scorer="m@x", value=7.0, detail={"of": 9}),
    ]  # fmt: skip
    for _ in range(2):  # a round that is repeated says the same again
        corpus.add_feedback(said, round_=2, run_id=RUN_ID)
    assert corpus.rows("SELECT round, policy, text, completion_tokens FROM rollouts ORDER BY text") == [
        (2, "base", "draft", 4), (2, "base", "other draft", 0),
    ]  # fmt: skip
    assert corpus.rows("SELECT round, kind, rejected, chosen, completion_id::VARCHAR FROM pairs") == [
        (2, "rewrite", "draft", "better", wrote.completion_id),
    ]  # fmt: skip
    assert corpus.rows("SELECT value, detail->>'of' FROM feedback WHERE kind = 'grade'") == [(7.0, "9")]
    corpus.add_feedback(said, round_=3, run_id=RUN_ID)
    assert stored(corpus, "feedback") == 4


def test_the_logprob_views_have_a_row_for_each_token_and_alternative(corpus: Corpus) -> None:
    ask = request(body={"model": "org/m@v2"})
    shown = [token("a", -LN2, ("a", -LN2), ("b", -2 * LN2)), token("z", -3.0, ("c", -9999.0))]
    store(corpus, completion(ask, logprobs=shown), asked=[ask], scorer=f"org/m@v2@{CONTEXT}")
    assert corpus.rows(
        "SELECT position, token_id, token, round(logprob, 3), round(missing_mass, 2) FROM token_logprobs ORDER BY ALL"
    ) == [(1, -1, "a", pytest.approx(-0.693), 0.25), (2, -2, "z", -3.0, 1.0)]
    assert corpus.rows("SELECT position, rank, token, round(logprob, 3) FROM top_logprobs ORDER BY ALL") == [
        (1, 1, "a", pytest.approx(-0.693)), (1, 2, "b", pytest.approx(-1.386)), (2, 1, "c", None),
    ]  # fmt: skip


def metric(**changes: Any) -> dict[str, Any]:
    given = {"run_id": RUN_ID, "stage": "evaluate", "checkpoint": "sft", "round": 0, "step": 0, "split": "heldout",
             "name": "teacher_nll", "value": 1.0, "lo": 0.5, "hi": 1.5, "set_id": "s"}  # fmt: skip
    return {**given, **changes}


def test_metrics_are_upserted_on_their_key_and_the_leaderboard_shows_evaluations(corpus: Corpus) -> None:
    corpus.log_metrics([metric(), metric(checkpoint="round-1", round=1, value=0.5), metric(stage="sft", step=5)])
    corpus.log_metrics([metric(value=2.0, lo=None), metric(set_id="another")])
    assert corpus.rows("SELECT set_id, split, name, checkpoint, value, lo, hi FROM leaderboard") == [
        ("another", "heldout", "teacher_nll", "sft", 1.0, 0.5, 1.5),
        ("s", "heldout", "teacher_nll", "sft", 2.0, None, 1.5),
        ("s", "heldout", "teacher_nll", "round-1", 0.5, 0.5, 1.5),
    ]
    assert stored(corpus, "metrics") == 4


# --- the schema


def test_every_column_of_the_schema_has_a_comment_and_is_in_the_file(corpus: Corpus) -> None:
    written = []
    for table, body in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+) \((.*?)\n\);", SCHEMA, re.DOTALL):
        for line in body.strip().splitlines():
            column, comment = re.match(r"\s*(\w+)[^-]*(?:-- (.+))?", line).groups()  # type: ignore[union-attr]
            if column not in ("PRIMARY", "UNIQUE"):
                assert comment, f"{table}.{column} has no comment"
                written.append((table, column))
    with corpus.connect() as con:
        made = con.execute(
            "SELECT table_name, column_name FROM duckdb_columns() "
            "WHERE table_name IN (SELECT table_name FROM duckdb_tables()) ORDER BY table_name, column_index"
        ).fetchall()
    assert made == sorted(written, key=lambda pair: pair[0])
    assert {table for table, _ in written} == {
        "meta", "runs", "prompts", "requests", "attempts", "completions", "logprobs", "vocab", "feedback", "metrics",
        "capabilities", "dead_letters", "curation",
    }  # fmt: skip


def test_there_are_the_views_that_people_are_promised(corpus: Corpus) -> None:
    views = {name for (name,) in corpus.rows("SELECT view_name FROM duckdb_views() WHERE NOT internal")}
    assert views >= {"pending", "sft", "pairs", "rollouts", "spend", "token_logprobs", "top_logprobs", "leaderboard"}


def test_a_duckdb_file_that_is_no_corpus_is_left_alone(tmp_path: Path) -> None:
    with duckdb.connect(str(tmp_path / "mine.duckdb")) as con:
        con.execute("CREATE TABLE bills (x INT)")
    with pytest.raises(CorpusError, match=r"mine\.duckdb is a DuckDB file, but no corpus \(its tables: bills\)"):
        Corpus(tmp_path / "mine.duckdb")
    with duckdb.connect(str(tmp_path / "mine.duckdb")) as con:
        assert con.sql("SHOW TABLES").fetchall() == [("bills",)]


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.duckdb").write_bytes(b"x" * 5000)
    with pytest.raises(CorpusError, match=r"cannot open .*c\.duckdb.*not a valid DuckDB") as caught:
        Corpus(tmp_path / "c.duckdb")
    assert "\n" not in str(caught.value)


def test_a_corpus_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="cannot make the folder"):
        Corpus(tmp_path / "file" / "c.duckdb")


def test_a_corpus_of_a_newer_version_is_refused(corpus: Corpus) -> None:
    corpus.rows("UPDATE meta SET value = '2' WHERE key = 'schema_version'")
    with pytest.raises(CorpusError, match="has schema version 2, this blackbox_kd speaks 1: upgrade it"):
        Corpus(corpus.path)


# --- others at the file


def test_a_corpus_that_another_process_holds_is_waited_for(corpus: Corpus) -> None:
    with held_open(corpus.path) as other:
        timer = threading.Timer(0.4, let_go, [other])
        timer.start()
        start = time.monotonic()
        assert corpus.rows("SELECT 1") == [(1,)]
        assert time.monotonic() - start > 0.3
        timer.join()


def test_a_corpus_that_is_held_for_too_long_names_its_holder(corpus: Corpus) -> None:
    with held_open(corpus.path) as other:
        for ask in (lambda: Corpus(corpus.path, lock_wait_s=0.2), lambda: query(corpus.path, "SELECT 1", wait_s=0.2)):
            with pytest.raises(CorpusBusy) as caught:
                ask()
            assert "is held open by another program" in str(caught.value)
            assert f"(PID {other.pid})" in str(caught.value)
            assert str(caught.value).endswith("close it there")
        assert not corpus.try_ingest([answered()])
    assert corpus.try_ingest([answered()])


def test_a_held_corpus_keeps_the_journal_for_the_next_start(corpus: Corpus) -> None:
    abandon(corpus, answered())
    with held_open(corpus.path), pytest.raises(CorpusBusy):
        Corpus(corpus.path, lock_wait_s=0.2)
    assert stored(Corpus(corpus.path), "completions") == 1


def test_two_processes_may_make_the_same_corpus_at_once(tmp_path: Path) -> None:
    code = "import sys, pathlib, blackbox_kd.corpus as c; print(c.Corpus(pathlib.Path(sys.argv[1])).rows('FROM meta'))"
    command = [sys.executable, "-c", code, str(tmp_path / "c.duckdb")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate(timeout=60)[0].strip() for one in both] == ["[('schema_version', '1')]"] * 2


# --- questions of people


def test_a_query_gives_columns_and_rows(corpus: Corpus) -> None:
    assert query(corpus.path, "SELECT 1 AS a, 'x' AS b UNION ALL SELECT 2, NULL") == (["a", "b"], [(1, "x"), (2, None)])


@pytest.mark.parametrize(
    ("sql", "said"),
    [("selec 1", "syntax error"), ("FROM nothing", "nothing does not exist"), ("", "No open result set"),
     ("DELETE FROM meta", "read-only"), ("CREATE TABLE x (a INT)", "read-only")],
)  # fmt: skip
def test_a_query_that_duckdb_refuses_is_one_line(corpus: Corpus, sql: str, said: str) -> None:
    with pytest.raises(CorpusError, match=said) as caught:
        query(corpus.path, sql)
    assert "\n" not in str(caught.value)


def test_a_query_of_no_corpus_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no corpus '.*': run a stage first, or name one with --corpus"):
        query(tmp_path / "none.duckdb", "SELECT 1")
    assert list(tmp_path.iterdir()) == []


def test_rows_are_exported_to_parquet_and_json_lines(corpus: Corpus, tmp_path: Path) -> None:
    sampled(corpus)
    select = "SELECT text, model FROM teacher_rows WHERE model = 'm' ORDER BY text"
    assert export(corpus.path, select, tmp_path / "it's.parquet") == 3  # good, good too, other context
    assert duckdb.sql(f"SELECT text FROM '{tmp_path}/it''s.parquet'").fetchall()[0] == ("good",)
    assert export(corpus.path, select, tmp_path / "rows.jsonl") == 3
    assert (tmp_path / "rows.jsonl").read_text().splitlines()[0] == '{"text":"good","model":"m"}'
    with pytest.raises(CorpusError, match=r"rows\.jsonl"):
        export(corpus.path, select, tmp_path / "no" / "rows.jsonl")


# --- read as arrays


def test_scored_tokens_are_arrays_of_what_was_stored(corpus: Corpus) -> None:
    first = completion(logprobs=[
        token("a", -1.0, ("a", -1.0), ("b", -2.0)),
        token("c", -9999.0, ("b", -0.5)),  # hidden, and fewer than the others have
    ])  # fmt: skip
    second = completion(text="Ho", choice_idx=1, logprobs=[token("b", -0.25, ("b", -0.25), ("c", -9999.0))])
    bare = completion(text="Hm", choice_idx=2, logprobs=[token("a", -0.125)])
    none = completion(text="No", choice_idx=3)
    store(corpus, first, second, bare, none)
    ids = [c.completion_id for c in (first, second, bare, none)]
    found = corpus.scored_tokens(ids, f"m@{CONTEXT}")
    assert set(found) == set(ids[:3])
    vocab = corpus.vocab("m")
    assert {t.text: t.bytes for t in vocab.values()} == {"a": b"a", "b": b"b", "c": b"c"}
    spell = {token_id: t.text for token_id, t in vocab.items()} | {0: ""}

    def read(c: Completion) -> tuple[Any, ...]:
        t = found[c.completion_id]
        texts = [[spell[i] for i in row] for row in t.top_ids.tolist()]
        return [spell[i] for i in t.token_ids.tolist()], t.token_logprobs.tolist(), texts, t.top_logprobs.tolist()

    inf = float("inf")
    texts, values, top, top_values = read(first)
    assert (texts, top, top_values) == (["a", "c"], [["a", "b"], ["b", ""]], [[-1.0, -2.0], [-0.5, -inf]])
    assert values[0] == -1.0
    assert math.isnan(values[1])
    assert read(second) == (["b"], [-0.25], [["b", "c"]], [[-0.25, -inf]])
    assert read(bare) == (["a"], [-0.125], [[]], [[]])
    assert found[bare.completion_id].top_ids.shape == (1, 0)
    assert corpus.scored_tokens(ids, "m@another") == {}
    assert corpus.vocab("another") == {}


def test_threads_that_open_and_close_at_the_same_time_wait_for_each_other(corpus: Corpus) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import pyarrow as pa

    from blackbox_kd.corpus.connection import connect

    def look(i: int) -> int:
        with connect(corpus.path, read_only=i % 3 == 0, wait_s=30.0) as con:
            rows = pa.table({"x": [i]})  # noqa: F841, found by its name: needs what Python adds to an instance
            return int(con.execute("select count(*) from rows").fetchall()[0][0])

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(look, range(200))) == 200


def test_threads_that_bring_new_tokens_at_the_same_time_give_each_an_id_of_its_own(corpus: Corpus) -> None:
    from concurrent.futures import ThreadPoolExecutor

    asked = [request(sample_idx=i) for i in range(160)]
    corpus.add_requests(asked)

    def bring(writer: int) -> None:
        vocabs = Vocabs()
        for batch in range(5):
            numbers = range(40 * writer + 8 * batch, 40 * writer + 8 * batch + 8)
            texts = {i: [f"{i} {word} " for word in range(6)] for i in numbers}
            made = [
                answered(completion(asked[i], text="".join(said), logprobs=[token(text, -1.0) for text in said]))
                for i, said in texts.items()
            ]
            assert corpus.try_ingest(made, vocabs=vocabs, wait_s=30.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bring, range(4)))
    found = corpus.answers([r.request_key for r in asked])
    assert (corpus.refused, len(found)) == (0, 160)
    for (choice,) in found.values():
        assert "".join(t.token for t in choice.logprobs or []) == choice.text


def test_tokens_that_a_refused_batch_loses_are_not_remembered(corpus: Corpus) -> None:
    vocabs, asked = Vocabs(), [request(sample_idx=i) for i in range(3)]
    corpus.add_requests(asked)
    lost = Scores(completion_id="no uuid", model="m", logprobs=[token("lost", -1.0)])
    assert corpus.try_ingest([Answered(attempt=attempt(asked[0]), scores=lost)], vocabs=vocabs)
    assert corpus.refused == 1
    for i, text in enumerate(("of another thread", "lost"), 1):  # as many as were lost
        made = completion(asked[i], text=text, logprobs=[token(text, -1.0)])
        assert corpus.try_ingest([answered(made)], vocabs=Vocabs() if i == 1 else vocabs)
        (found,) = corpus.answers([asked[i].request_key])[asked[i].request_key]
        assert [t.token for t in found.logprobs or []] == [text]

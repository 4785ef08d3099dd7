"""`report`: what the page says of a run, whole or not, and that it says nothing of other runs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blackbox_kd import report
from blackbox_kd.__main__ import main
from blackbox_kd.report import charts, spend, tables, words
from blackbox_kd.report.charts import Point, Series, chart
from blackbox_kd.report.tokens import pieces
from tests.conftest import RUN_ID
from tests.reported import CHECKPOINTS, Run, whole

OTHER_RUN, THIRD_RUN = (f"00000000-0000-4000-8000-00000000000{n}" for n in (2, 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole(tmp_path_factory.mktemp("report") / "told")


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return report.write(run.folder).read_text("utf-8")


def visible(page: str) -> str:
    """Its text, without tags and with single spaces."""
    return " ".join(re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]).split())


def of(run: Run) -> str:
    return visible(report.write(run.save().folder).read_text("utf-8"))


def test_the_headline_is_the_verdict_with_its_numbers(page: str) -> None:
    text = visible(page)
    assert "round-2 is nearer to its teacher than sft, but within the uncertainty" in text
    assert "tail_kl is 0.13 [0.117, 0.143] for round-2 and 0.15 [0.135, 0.165] for sft" in text
    assert "The two 95% intervals overlap" in text


def test_the_loop_is_counted(page: str) -> None:
    text = visible(page)
    for part in ("6 train 12 held-out", "6 answers of the teacher 5 of them whole",
                 "12 optimiser steps loss 0.611 → 0.0914", "round 2 3 texts by the student rewrite: 3, 33% unchanged",
                 "4 checkpoints", "24 calls to an endpoint, 660 tokens billed, cost unknown"):  # fmt: skip
        assert part in text


def test_spend_is_shown_for_each_row_that_came_of_it(page: str) -> None:
    # 6 calls of 20 + 4 tokens brought 5 whole answers: 28.8 a row; 11 rows to learn from in all
    assert "sample 6 120 24 unknown 5 28.8 unknown" in visible(page)
    assert "in all 24 540 120 unknown 11 60 unknown" in visible(page)


def test_a_text_is_never_markup(page: str) -> None:
    assert page.count("<script") == 0
    assert page.count("<img") == 0
    assert page.count("</style>") == 1
    assert "&lt;script&gt;document.title" in page


def test_the_page_needs_nothing_beside_it(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["'](?!#)|url\(|@import""", page)


def test_tokens_are_coloured_by_their_logprob(page: str) -> None:
    assert f'<span class="p2" title="{words.MINUS}0.7 nats">' in page
    assert '<span class="p4" title=' in page


def test_the_same_corpus_gives_the_same_page(run: Run, page: str) -> None:
    assert report.write(run.folder).read_text("utf-8") == page


def test_examples_go_from_the_most_gained_to_the_least(page: str) -> None:
    shown = re.findall(r"(gained most|in the middle|gained least): (\S+) chrf from sft to round-2", visible(page))
    assert [why for why, _ in shown] == ["gained most"] * 4 + ["in the middle"] * 4 + ["gained least"] * 4
    gains = [float(gain.replace(words.MINUS, "-")) for _, gain in shown]
    assert gains == sorted(gains, reverse=True)
    assert len(set(re.findall(r"Question \d", visible(page)))) == 10


def test_answers_that_were_drawn_for_their_diversity_are_not_a_checkpoint_s_answers(page: str) -> None:
    assert "drawn " not in visible(page)


def begun(folder: Path, stages: int) -> Run:
    """A run that was killed after so many stages."""
    run = Run(folder)
    steps = [run.sampled, lambda: run.trained("sft", 12), lambda: run.drafted(1, [("a b", "a c")]),
             lambda: run.trained("round-1", 4), lambda: run.evaluated(CHECKPOINTS[:2], {})]  # fmt: skip
    for step in steps[:stages]:
        step()
    return run


UNFINISHED = [
    (0, ["sft has not ended", "has called no endpoint", "Nothing has been trained", "No on-policy round"]),
    (1, ["sft has not ended", "6 answers of the teacher", "Nothing has been trained"]),
    (2, ["0 of 2 on-policy rounds are done; base and sft have not been evaluated", "No on-policy round"]),
    (3, ["round 1 1 texts by the student rewrite: 1, 0% unchanged", "0 of 2 on-policy rounds"]),
    (4, ["1 of 2 on-policy rounds", "base, sft and round-1 have not been evaluated", "Nothing to compare yet"]),
    (5, ["round-1 has not been evaluated", "sft is nearer to its teacher than base", "No held-out answers"]),
]


@pytest.mark.parametrize(("stages", "said"), UNFINISHED)
def test_a_run_that_is_not_through_has_a_page_that_says_so(stages: int, said: list[str], tmp_path: Path) -> None:
    text = of(begun(tmp_path / "run", stages))
    assert "Not finished:" in text
    for part in said:
        assert part in text


def test_a_run_of_another_version_has_a_page(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 1)
    with run.corpus.connect() as con:
        con.execute("""UPDATE runs SET config = json_merge_patch(config, '{"sft": {"gone": 1}, "report_to": null}')""")
    assert "6 answers of the teacher" in of(run)


def test_looks_are_drawn_before_the_first_evaluation(tmp_path: Path) -> None:
    assert "tail_kl Nats a token by optimiser step, with 95% bands." in of(begun(tmp_path / "run", 2))


def test_other_runs_on_the_corpus_are_left_out_and_what_they_paid_for_is_called_shared(
    run: Run, tmp_path: Path
) -> None:
    other = Run(tmp_path / "other", run_id=OTHER_RUN, corpus=run.corpus.path)
    other.trained("sft", 3)
    text = of(other)
    assert "Shared: 12 of 12 answers of evaluate, 6 of 6 answers of sample were paid for by another run" in text
    assert "has called no endpoint" in text
    assert "round 1" not in text
    assert "No checkpoint has been evaluated" in text


def test_a_run_that_asks_otherwise_or_asks_more_later_changes_nothing(tmp_path: Path) -> None:
    run = whole(tmp_path / "run")
    page = report.write(run.folder).read_text("utf-8")
    cut_off = Run(tmp_path / "cut_off", run_id=OTHER_RUN, corpus=run.corpus.path, evaluate={"max_completion_length": 1},
                  sample={"max_completion_length": 1})  # fmt: skip
    cut_off.sampled()
    for name in CHECKPOINTS[1:]:
        cut_off.trained(name, 1)  # to the same weights
    answers = dict.fromkeys(("teacher", *CHECKPOINTS), "cut")
    cut_off.evaluated(CHECKPOINTS, {f"Question {i}": answers for i in range(10)})
    cut_off.save()
    more = Run(tmp_path / "more", run_id=THIRD_RUN, corpus=run.corpus.path)
    more.start = 4e9
    more.sampled(9)
    more.evaluated((), {"Another question": {"teacher": "later"}})
    more.save()
    assert report.write(run.folder).read_text("utf-8") == page


def test_a_checkpoint_that_was_deleted_has_no_say(tmp_path: Path) -> None:
    run = whole(tmp_path / "run")
    gate = {"checkpoint": "round-2", "drop": 0.2, "lo": 0.1, "hi": 0.3, "limit": 0.05, "passed": False}
    (run.folder / "summary.json").write_text(json.dumps({"gate": {"sums": gate}}))
    assert "fails 1 of 1 gates" in of(run)
    shutil.rmtree(run.folder / "checkpoints" / "round-2")
    text = of(run)
    assert "round-1 is nearer to its teacher than sft" in text
    assert "gates" not in text
    assert "3 checkpoints" in text


def test_a_round_that_is_still_to_be_committed_shows_what_is_known_of_it(tmp_path: Path) -> None:
    rows = [metric("round-2", 1.0, stage="onpolicy"), metric("round-3", 1.0, stage="onpolicy"), metric("round-2", 1.0)]
    assert tables.of_checkpoints(rows, ["sft", "round-1"], 2) == rows[:1]


def test_judges_are_booked_where_they_were_asked() -> None:
    calls = dict.fromkeys(("calls", "lost", "rate_limited", "completion_tokens", "unpriced"), 0) | {"cost_usd": None}
    rows = [{"purpose": p, "prompt_tokens": 10 * n, **calls}
            for n, p in enumerate(("sample", "best_of_n", "judge", "rubric", "win_rate", "evaluate"), 1)]  # fmt: skip
    booked = {each.stage: (each.prompt_tokens, each.purposes) for each in spend.by_stage(rows, [], [])}
    assert booked == {"sample": (10, ""), "curate": (20, "best_of_n"), "onpolicy": (70, "judge, rubric"),
                      "win_rate": (50, ""), "evaluate": (60, "")}  # fmt: skip
    assert set(booked) <= set(spend.STAGES)


def test_a_priced_run_shows_dollars_over_time_and_for_each_row(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.sampled(cost_usd=0.25)
    text = of(run)
    assert "cost $1.50" in text
    assert "dollars billed" in text
    assert "sample 6 120 24 $1.50 5 28.8 $0.3000" in text


def test_gates_and_tasks_are_told_with_their_limits(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 5)
    run.log("evaluate", [
        {"checkpoint": c, "name": n, "value": v, "lo": v - 0.1, "hi": v + 0.1, "split": "holdback", "set_id": "set-a"}
        for c, n, v in [("base", "task_sums", 0.9), ("sft", "task_sums", 0.7), ("sft", "task_sums_drop", 0.2)]
    ])  # fmt: skip
    gate = {"sums": {"checkpoint": "sft", "drop": 0.2, "lo": 0.1, "hi": 0.3, "limit": 0.05, "passed": False}}
    (run.folder / "summary.json").write_text(json.dumps({"gate": gate}))
    text = of(run)
    assert "It fails 1 of 1 gates: sums got worse" in text
    assert "sums sft 0.2 [0.1, 0.3] 0.05 failed" in text
    assert f"base 0.9 [0.8, 1] {words.DASH} sft 0.7 [0.6, 0.8] 0.2 [0.1, 0.3]" in text


def test_curation_is_shown_where_the_corpus_has_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 1)
    assert "Curation" not in of(run)
    with run.corpus.connect() as con:
        con.execute("CREATE TABLE IF NOT EXISTS curation (completion_id UUID, reason VARCHAR, detail JSON, "
                    "action VARCHAR, run_id UUID, created_at TIMESTAMPTZ)")  # fmt: skip
        con.execute("INSERT INTO curation VALUES (uuid(), 'refusal', '{}', 'drop', ?, now())", [RUN_ID])
    assert "Curation reason action answers refusal drop 1" in of(run)


def test_numbers_on_another_fixed_set_do_not_mix(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 5)
    of(run)  # logged first
    old = {"checkpoint": "base", "name": "tail_kl", "value": 99.0, "lo": 98.0, "hi": 99.5, "split": "heldout"}
    with run.corpus.connect() as con:
        con.execute("UPDATE metrics SET logged_at = logged_at + INTERVAL 1 DAY")
    run.log("evaluate", [{**old, "set_id": "an-old-set"}])
    text = of(run)
    assert "99" not in text.partition("Config")[0].replace("95%", "")
    assert "on other sets ( an-old-s )" in text


def test_texts_are_cut_until_the_page_is_small_enough() -> None:
    assert [len(report.fitted("é".__mul__, most)) for most in (5000, 1700, 1600, 10)] == [2000, 800, 300, 100]


def test_a_text_that_is_cut_says_how_much_is_left_out(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", 2)
    run.drafted(1, [("word " * 500, "a b " * 600)])
    text = of(run)
    assert "word … 500 more characters" in text
    assert "a b … 400 more characters" in text


def test_the_command_prints_where_the_page_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run_dir", str(run.folder)]) == 0
    assert capsys.readouterr().out == f"{run.folder / 'report.html'}\n"


def test_without_a_name_it_is_the_last_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 2
    assert "no run below" in capsys.readouterr().err
    begun(tmp_path / "runs" / "one", 1).save()
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "runs/one/report.html\n"


def test_a_run_that_is_not_there_is_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run_dir", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
    stranger = Run(tmp_path / "stranger", run_id=OTHER_RUN)
    assert main(["report", "--run_dir", str(run.folder), "--corpus", str(stranger.corpus.path)]) == 2
    error = capsys.readouterr().err
    assert f"knows no run {RUN_ID}" in error
    assert len(error.splitlines()) == 1


def between(value: float, lo: float, hi: float) -> dict[str, Any]:
    return {"value": value, "lo": lo, "hi": hi}


@pytest.mark.parametrize(
    ("metric", "sft", "last", "headline"),
    [
        ("tail_kl", between(0.5, 0.4, 0.6), between(0.2, 0.1, 0.3), "round-1 is nearer to its teacher than sft"),
        ("tail_kl", between(0.2, 0.1, 0.3), between(0.5, 0.4, 0.6), "round-1 is further from its teacher than sft"),
        ("chrf", between(20, 10, 30), between(50, 40, 60), "round-1 is nearer to its teacher than sft"),
        ("tail_kl", between(0.5, 0.1, 0.9), between(0.6, 0.1, 0.9),
         "round-1 is further from its teacher than sft, but within the uncertainty"),
        ("tail_kl", between(0.5, 0.1, 0.9), between(0.5, 0.1, 0.9), "round-1 is as far from its teacher as sft"),
    ],
)  # fmt: skip
def test_the_verdict_is_as_sure_as_the_intervals(metric: str, sft: Any, last: Any, headline: str) -> None:
    found = words.verdict(metric, {"base": between(2, 1.9, 2.1), "sft": sft, "round-1": last})
    assert found.headline == headline
    assert ("do not overlap" in found.detail) == ("uncertainty" not in headline and "as far" not in headline)
    assert "It was 2 [1.9, 2.1] for base." in found.detail


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.1409, "0.141"), (98.44, "98.4"), (1234567, "1\u202f234\u202f567"), (-0.5, "\u22120.5"), (3.0, "3"),
     (None, "\u2013"), (0, "0")],
)  # fmt: skip
def test_numbers_have_three_digits_that_count(value: float | None, shown: str) -> None:
    assert words.number(value) == shown


@pytest.mark.parametrize(
    ("text", "tokens", "cut"),
    [
        ("ab c", ["ab", " c"], ["ab", " c"]),
        ("a🙂 b", ["a", "�", "�", " b"], ["a", "🙂", " b"]),
        ("Hello world", ["Hello", "world"], ["Hello", " world"]),  # a tokenizer that leaves out spaces
        ("ab", ["ab", "<|im_end|>"], ["ab"]),
        ("ab", [], ["ab"]),
        ("xy", ["nothing", "of", "it"], ["xy"]),
    ],
)
def test_a_text_is_cut_at_its_tokens(text: str, tokens: list[str], cut: list[str]) -> None:
    assert [piece.text for piece in pieces(text, [(token, -1.0) for token in tokens])] == cut


@settings(max_examples=60)
@given(st.text(max_size=30), st.lists(st.tuples(st.text(max_size=4), st.floats(-9, 0) | st.none())))
def test_the_pieces_of_a_text_are_the_text(text: str, tokens: list[tuple[str, float | None]]) -> None:
    assert "".join(piece.text for piece in pieces(text, tokens)) == text


def test_tokens_of_one_character_share_their_logprobs() -> None:
    (piece,) = pieces("🙂", [("�", -1.0), ("�", -0.5)])
    assert piece.logprob == -1.5
    assert piece.tone == 2  # exp(-1.5) is 0.22


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_within(low: float, width: float) -> None:
    ticks = charts.linear_ticks(low, low + width)
    assert len(ticks) <= 7
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)


@given(st.floats(1e-6, 1e3), st.floats(8, 1e6))
def test_logarithmic_ticks_are_within(low: float, ratio: float) -> None:
    ticks = charts.log_ticks(low, low * ratio)
    assert ticks
    assert all(low <= tick <= low * ratio for tick in ticks)


def test_a_wide_range_is_logarithmic_and_a_narrow_one_starts_at_0_only_if_that_is_near() -> None:
    assert charts.span([0.1, 1.0], areas=False)[2]
    assert charts.span([1.0, 4.0], areas=False)[0] == 0
    assert charts.span([3.0, 4.0], areas=False)[0] > 2.9
    assert charts.span([0.0, 5.0], areas=True) == (0.0, 5.0, False)


def test_a_line_keeps_its_ends_when_it_is_thinned() -> None:
    points = [Point(i, i) for i in range(10_000)]
    kept = charts.thinned(points)
    assert len(kept) == charts.MOST_POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_areas_lie_on_each_other() -> None:
    below, above = charts.stacked([("a", [1, 2]), ("b", [3, 3])], [0, 1])
    assert [p.y for p in below.points] == [1, 2]
    assert [(p.lo, p.hi) for p in above.points] == [(1, 4), (2, 5)]


def test_a_chart_places_its_points_inside_the_axes() -> None:
    drawn = chart("x", [Series("a", [Point(0, 1, 0.5, 2), Point(10, 3, 2, 4)])], marks=[(0, "sft"), (5, "round-1")])
    assert drawn is not None
    numbers = [float(n) for n in re.findall(r"[\d.]+", drawn.series[0].line + " " + drawn.series[0].band)]
    assert min(numbers) >= charts.TOP - 0.1
    assert max(numbers) <= charts.WIDTH - charts.RIGHT + 0.1
    assert [mark.label for mark in drawn.marks] == ["sft", "round-1"]
    assert chart("nothing", [Series("a", [])]) is None


def metric(checkpoint: str, value: float, **changes: Any) -> dict[str, Any]:
    given = {"stage": "evaluate", "checkpoint": checkpoint, "round": 0, "step": 0, "split": "heldout",
             "name": "tail_kl", "value": value, "lo": None, "hi": None, "set_id": "s", "at_s": 0.0}  # fmt: skip
    return {**given, **changes}


def test_the_best_checkpoint_is_never_the_teacher_and_none_where_all_are_equal() -> None:
    rows = [metric("round-10", 0.3), metric("base", 0.5), metric("teacher", 0.0), metric("round-2", 0.2)]
    table = tables.by_checkpoint(rows, "heldout", ["tail_kl"])
    assert table is not None
    assert [(name, cells[0].is_best) for name, _, cells in table.rows] == [
        ("base", False), ("round-2", True), ("round-10", False), ("teacher", False)
    ]  # fmt: skip
    equal = tables.by_checkpoint([metric("base", 1.0), metric("sft", 1.0)], "heldout", ["tail_kl"])
    assert equal is not None
    assert not any(cells[0].is_best for _, _, cells in equal.rows)


def test_the_verdict_names_a_checkpoint_in_between_that_is_better() -> None:
    numbers = {name: between(value, 0, 9) for name, value in zip(CHECKPOINTS, (2, 0.5, 0.2, 0.3), strict=True)}
    assert "The best is round-1 with 0.2 [0, 9]." in words.verdict("tail_kl", numbers).detail


def test_the_base_model_is_not_the_best_at_being_itself() -> None:
    rows = [metric("base", 100.0, name="chrf", split="holdback"), metric("sft", 49.2, name="chrf", split="holdback")]
    table = tables.by_checkpoint(rows, "holdback", ["chrf"])
    assert table is not None
    assert not any(cells[0].is_best for _, _, cells in table.rows)
    said = "On hold-back prompts sft's answers are 49.2 [36, 62.7] of 100 like those of base (chrf)."
    assert words.holdback_words({"base": between(100, 100, 100), "sft": between(49.2, 36, 62.7)}) == said


def test_steps_are_counted_through_the_run() -> None:
    rows = [metric("sft", 1.0, stage="sft", step=36), metric("round-1", 1.0, stage="onpolicy", step=12, round=1)]
    assert tables.stages(rows) == {"sft": (0, 36), "round-1": (36, 48)}
    (held, ood) = tables.looks([*rows, metric("base", 2.0), metric("round-1", 0.5)], "s", "tail_kl")
    assert [(p.x, p.y) for p in held.points] == [(0, 2.0), (36, 1.0), (48, 0.5)]  # the checkpoint's own number counts
    assert not ood.points


def test_colours_part_at_their_bounds() -> None:
    tones = [pieces("a", [("a", math.log(p))])[0].tone for p in (0.95, 0.6, 0.3, 0.1, 0.01)]
    assert tones == [0, 1, 2, 3, 4]

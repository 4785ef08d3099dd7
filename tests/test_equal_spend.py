"""The study's arithmetic: how a spend is divided, how arms are compared, what is left out."""

from __future__ import annotations

import argparse
import fcntl
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import equal_spend_table as tables
import pytest
from algorithms import TASK
from equal_spend import (
    ANSWER_TOKENS,
    ARMS,
    MARGIN,
    PASSES,
    RESULTS,
    ROUNDS,
    SPENDS,
    STEPS,
    TUNED,
    Arm,
    Run,
    in_order,
    keep,
    key_of,
    least,
    limits,
    missing,
    on_its_own,
    run_of,
    run_one,
    sizes,
    study,
    taken,
    told,
    work,
)
from paired import minus

from blackbox_kd.config import load_config
from blackbox_kd.corpus import Corpus
from blackbox_kd.errors import AlignmentError
from blackbox_kd.settings import Config

DROP = "task_everyday_drop"
LIMITS = {DROP: 0.25}


def row(arm: str, seed: int, kl: list[float], spend: int = 8000, drop: float = 0.0) -> dict[str, Any]:
    chrf = {"chrf": [50.0] * len(kl)}
    held = dict.fromkeys(tables.KL, kl) | {"tokens": [2.0] * len(kl)} | chrf
    return {"arm": arm, "seed": seed, "spend": spend, "trial": 0, "settings": {}, "held": 48, "answers": 1,
            "prompts_per_round": 1, "steps": 6, "teacher_tokens": spend, "device": "cpu", "wall_s": 60.0 * seed,
            "prompts": {"heldout": held, "ood": chrf, "holdback": {DROP: [0.0, drop]} | chrf}}  # fmt: skip


@pytest.mark.parametrize("spend", SPENDS)
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_spends_what_it_is_given(arm: str, spend: int) -> None:
    share = 0.5 if ARMS[arm].cost else 0.0
    answers, prompts, _ = sizes(ARMS[arm], spend, share)
    spent = answers * ANSWER_TOKENS + ROUNDS * prompts * ARMS[arm].cost
    assert abs(spent - spend) <= max(ANSWER_TOKENS, 0.02 * spend)


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.cost])
def test_what_the_loop_is_told_is_learnt_as_often_at_every_spend(arm: str) -> None:
    found = {spend: sizes(ARMS[arm], spend, 0.5) for spend in SPENDS}
    paid = [spend for spend in SPENDS if found[spend].prompts_per_round]
    assert [found[spend].steps for spend in paid] == [STEPS * spend // paid[0] for spend in paid]


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.cost])
@pytest.mark.parametrize("spend", SPENDS)
def test_an_arm_that_asks_in_its_loop_is_not_trained_longer_than_one_that_copies(arm: str, spend: int) -> None:
    for trial in ARMS[arm].trials:
        size = sizes(ARMS[arm], spend, trial["share"], trial.get("steps", STEPS))
        passes = trial.get("sft.trainer.num_train_epochs", PASSES)
        samples = size.answers * passes + ROUNDS * size.steps * trial["onpolicy.update.batch_size"]
        assert not size.prompts_per_round or samples <= 1.03 * PASSES * spend / ANSWER_TOKENS


def test_an_arm_whose_prompt_costs_more_than_its_share_has_none() -> None:
    assert sizes(Arm("score:pg", 9_400), 8_000, 0.5).prompts_per_round == 0


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config(arm: str, tmp_path: Path) -> None:
    run = Run(arm, 72_000, 1, 0, {"share": 0.5} if ARMS[arm].cost else {}, 48, tmp_path, "cpu", 1)
    config = load_config(Config, TASK, run.overrides())
    assert config.onpolicy.algorithm.name == (ARMS[arm].algorithm or "relabel").split(":")[0]
    assert config.sample.max_prompts == run.sizes.answers
    assert (config.prompts.limits["heldout"], config.prompts.limits["ood"]) == (48, 24)


def test_the_trials_that_are_taken_are_those_that_were_best() -> None:
    assert limits() == LIMITS
    for arm, found in json.loads(TUNED.read_text()).items():
        values = [{"true_kl": kl, DROP: lost} for kl, lost in zip(*found["dev"].values(), strict=True)]
        within = {name: limit * MARGIN for name, limit in LIMITS.items()}
        assert found["trial"] == taken([v if v["true_kl"] is not None else None for v in values], within), arm
        assert found["settings"] == ARMS[arm].trials[found["trial"]]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([(0.2, 0.0), (0.1, 0.25)], 1),  # exactly the limit passes
        ([(0.2, 0.0), (0.1, 0.5)], 0),  # the nearest to the teacher has lost too much
        ([(0.1, 0.6), (0.2, 0.5)], 1),  # none passes
        ([None, (0.2, 0.9)], 1),
    ],
)
def test_the_gate_on_hold_back_tasks_is_part_of_the_choice(values: list[tuple[float, float] | None], best: int) -> None:
    assert taken([v and {"true_kl": v[0], DROP: v[1]} for v in values], LIMITS) == best


def test_a_win_is_an_interval_below_zero_on_the_seeds_that_both_have() -> None:
    better, worse = [[0.1, 0.2, 0.1], [0.9, 1.0, 0.8]]
    rows = [row("sft", s, worse) for s in (1, 2)] + [row("relabel", s, better) for s in (1, 2, 3)]
    rows += [row("gad", 1, worse), {"arm": "forks", "seed": 1, "spend": 8000, "trial": 0, "failed": "TeacherError: x"}]
    found = tables.summary(rows, LIMITS)
    value, lo, hi, seeds = found["minus_sft"]["relabel"]["8000"]
    assert value == pytest.approx((0.4 - 2.7) / 6)  # sums over three prompts of two tokens each
    assert lo <= value <= hi < 0
    assert seeds == 2
    assert found["wins"] == {"sft": {"relabel": 1.0, "gad": 0.0}}
    assert found["minus_sft"]["gad"]["8000"] == (0, 0, 0, 1)
    assert [each["arm"] for each in found["failed"]] == ["forks"]


def test_the_table_has_every_arm_also_where_it_failed() -> None:
    rows = [row("sft", 1, [1.0]), {"arm": "forks", "seed": 1, "spend": 8000, "trial": 0, "failed": "TeacherError: x"}]
    lines = tables.table(tables.summary(rows, LIMITS)).splitlines()
    assert lines[2:4] == ["| `sft` | 0.500 |", "| `forks` | - |"]


def test_the_table_compares_with_both_baselines() -> None:
    rows = [row("sft", 1, [1.0, 1.0]), row("sft:soft", 1, [0.5, 0.5]), row("gad", 1, [0.75, 0.75])]
    text = tables.table(tables.summary(rows, LIMITS))
    minus = {head: block.splitlines() for block in text.split("\n\n") if (head := block.split("|")[1].strip())}
    assert "| `gad` | 0.375 (-0.125 [-0.125, -0.125], 1) |" in minus["true forward KL (minus `sft`)"]
    assert "| `gad` | +0.125 [+0.125, +0.125], 1 |" in minus["minus `sft:soft`"]


def test_rows_of_other_answers_are_not_compared() -> None:
    other = row("gad", 2, [1.0, 1.0])
    other["prompts"]["heldout"]["tokens"] = [2.0, 3.0]
    with pytest.raises(AlignmentError, match=r"'gad', 8000, 2.* other held-out answers than .*'sft', 8000, 1"):
        tables.summary([row("sft", 1, [1.0, 1.0]), other], LIMITS)


def test_more_seeds_do_not_make_prompts_that_are_hard_for_all_of_them_less_rare() -> None:
    apart = [0.0] * 9 + [1.0]
    one, three = (minus([apart] * n, [[0.0] * 10] * n, [1.0] * 10) for n in (1, 3))
    assert one == pytest.approx(three, abs=1e-12)


def test_the_table_says_what_was_lost_and_how_many_seeds_passed() -> None:
    rows = [row("sft", s, [1.0], drop=lost) for s, lost in ((1, 1.0), (2, 0.0), (3, 0.5))]  # 0.5, 0 and 0.25 a question
    found = tables.summary(rows, LIMITS)
    assert found["kept"] == {"sft": {"8000": pytest.approx(2 / 3)}}
    assert "| `sft` | +0.25 (2 of 3) |" in tables.table(found)


def test_what_was_read_from_the_cache_costs_a_tenth() -> None:
    known = row("sft", 1, [1.0]) | {"prompt_tokens": 1_000_000, "cached_tokens": 500_000, "completion_tokens": 100_000}
    assert tables.usd(known) == pytest.approx(0.14 + 0.014 + 0.042)
    found = tables.summary([known, row("sft", 2, [1.0])], LIMITS)  # of the second nobody knows
    assert "| US cents | 8,000 tokens |\n|---|---|\n| `sft` | 19.60 |" in tables.table(found)


def test_the_table_has_all_that_is_measured_and_seconds_by_device() -> None:
    rows = [row("sft", s, [0.5]) for s in (1, 2)] + [row("sft", 3, [0.5]) | {"device": "cuda", "wall_s": 7.0}]
    *_, head, _, line = tables.table(tables.summary(rows, LIMITS)).splitlines()
    assert head.startswith("| 8,000 tokens | `true_reverse_kl` | `tail_kl` | `teacher_nll` | `chrf_heldout` |")
    assert line == "| `sft` | 0.250 | 0.250 | 0.250 | 50.0 | 50.0 | 50.0 | 90 (cpu), 7 (cuda) |"


def test_what_was_measured_is_a_query_away(tmp_path: Path) -> None:
    former = row("sft", 1, [1.0], drop=0.5) | {"steps": 5}
    keep([former], path := tmp_path / "corpus.duckdb")
    keep([row("sft", 1, [1.0], drop=0.5)], path)  # in its place
    sql = "SELECT split, name, value FROM metrics WHERE stage = 'equal_spend' AND step = 8000 AND round = 1"
    found = {(split, name): value for split, name, value in Corpus(path).rows(sql, [])}
    assert found["heldout", "chrf"] == 50.0
    assert (found["holdback", DROP], found["train", "teacher_tokens"], len(found)) == (0.25, 8000, 9)


def test_an_sft_is_trained_before_others_need_it_and_seed_by_seed(tmp_path: Path) -> None:
    soft, kept = {"sft.trainer.num_train_epochs": 12}, {"share": 0.5, "onpolicy.replay": 0.7}
    arms = {"gad": soft, "sft:soft": soft, "prefix": soft | kept, "relabel": soft | kept, "relabel:worst": soft}
    runs = [Run(arm, 8_000, s, 0, more, 48, tmp_path, "cpu", 1) for s in (2, 1) for arm, more in arms.items()]
    ordered = in_order(runs)
    assert [run.seed for run in ordered] == [1] * 5 + [2] * 5
    assert [run.arm for run in ordered[:5]] == ["gad", "prefix", "relabel", "sft:soft", "relabel:worst"]


def test_two_studies_do_not_share_a_folder(tmp_path: Path) -> None:
    flags = argparse.Namespace(out=tmp_path, rows=tmp_path / "rows.jsonl", jobs=1, apart=False)
    with (tmp_path / "study.lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another study is at work there"):
            work([], flags)
    work([], flags)


def test_jobs_apart_share_what_was_trained_and_begin_with_what_was_asked(tmp_path: Path) -> None:
    keep([row("sft", 1, [1.0])], tmp_path / "corpus.duckdb")
    with ProcessPoolExecutor(1, get_context("spawn"), on_its_own, (tmp_path,)) as pool:
        found = pool.submit(run_one, Run("sft", 8_000, 1, 0, {"nothing.like.it": 1}, 48, tmp_path, "cpu", 1)).result()
    assert "nothing" in str(found)
    (mine,) = tmp_path.glob("worker-*")
    assert Corpus(mine / "corpus.duckdb").rows("SELECT count(*) FROM metrics", []) == [(9,)]
    assert (mine / "sft-8000-1.failed").exists()
    (mine / "sft" / "kept").touch()
    assert (tmp_path / "sft" / "kept").exists()


def test_an_arm_is_tuned_where_it_can_be_paid() -> None:
    assert least(ARMS["score:kl"], 0.5, SPENDS) == 24_000
    assert least(ARMS["relabel"], 0.5, SPENDS) == least(ARMS["sft"], 0.0, SPENDS) == 8_000


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert list(tables.read(path)) == []
    path.write_text(json.dumps(tables.rounded(row("sft", 1, [0.123456789]))) + "\n")
    (found,) = tables.read(path)
    assert found["prompts"]["heldout"]["true_kl"] == [0.1234568]


def test_a_run_on_another_sft_is_another_run(tmp_path: Path) -> None:
    run = Run("relabel", 8000, 1, 0, {"share": 0.5, "sft.dev_fraction": 0}, 48, tmp_path, "cpu", 1)
    again = run._replace(settings={"sft.dev_fraction": 0, "share": 0.5})
    assert key_of(json.loads(json.dumps(told(run)))) == key_of(told(again))
    assert key_of(told(run)) != key_of(told(run._replace(settings={"share": 0.5})))
    assert key_of(told(run)) != key_of(told(run._replace(held=16)))
    assert key_of(told(run)) != key_of(told(run) | {"prompts_per_round": 1})


def test_a_run_that_failed_and_was_made_again_counts_once(tmp_path: Path) -> None:
    flags = argparse.Namespace(arms=["sft"], seeds=[1], spend=[8000], held=48, out=tmp_path, device="cpu")
    flags.threads, flags.jobs, flags.apart, flags.done = 1, 1, False, False
    flags.rows = tmp_path / "rows.jsonl"
    tuned = json.loads(TUNED.read_text())["sft"]
    which = told(run_of("sft", 8000, 1, tuned["trial"], tuned["settings"], {}, flags))
    failed, made = which | {"failed": "TeacherError: x"}, row("sft", 1, [0.5]) | which
    run = run_of("sft", 8000, 1, tuned["trial"], tuned["settings"], {}, flags)
    flags.rows.write_text(json.dumps(failed) + "\n")
    assert missing([run], flags.rows) == [run]
    written = [failed, made, failed, row("sft", 1, [0.1])]  # the last is of other settings
    flags.rows.write_text("".join(json.dumps(each) + "\n" for each in written))
    assert missing([run], flags.rows) == []
    assert study(flags) == [made]


def test_the_page_has_the_tables_of_the_result() -> None:
    result = json.loads((RESULTS / "equal_spend.json").read_text())
    assert tables.table(result) in Path("docs/equal_spend.md").read_text()
    assert tables.headline(result) in Path("README.md").read_text()


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    rows = [row(arm, s, [kl], spend) for arm, kl in (("sft", 1.0), ("gad", 0.5)) for s in (1, 2) for spend in SPENDS]
    tables.plot(tables.summary(rows, LIMITS), tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()

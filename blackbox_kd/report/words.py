"""What the numbers of a run mean, which way is better, and what they add up to, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

Better = Literal["lower", "higher", ""]


class Term(NamedTuple):
    """A metric: what it is, and which way is better ('' where neither is)."""

    meaning: str
    better: Better = ""


GLOSSARY: dict[str, Term] = {
    "tail_kl": Term(
        "KL divergence of the student from the teacher, nats a token, on the teacher's own answers: over the tokens "
        "that the endpoint shows, everything else in one bucket. 0 is a student that cannot be told from its teacher",
        "lower",
    ),
    "teacher_nll": Term("how surprised the student is by the teacher's own answers, nats a token", "lower"),
    "chrf": Term("how alike the student's greedy answer and the teacher's are, by characters, 0 to 100", "higher"),
    "exact": Term("share of greedy answers that are the teacher's to the letter", "higher"),
    "win_rate_vs_teacher": Term("share of answers that the judge prefers to the teacher's", "higher"),
    "win_rate_vs_previous": Term("share of answers that the judge prefers to the checkpoint's before", "higher"),
    "length": Term("tokens of the student's greedy answer"),
    "entropy": Term("how undecided the writer is at each token, nats"),
    "distinct_1": Term("different words over all words, in the answers to all prompts together"),
    "distinct_2": Term("different word pairs over all word pairs, in the answers to all prompts together"),
    "repetition": Term("share of an answer that repeats itself (four words in a row); good is what the teacher has"),
    "coverage": Term("share of the student's tokens for which the teacher's alternatives are known"),
    "captured_mass": Term("the teacher's probability that could be mapped to tokens of the student"),
    "ambiguous_mass": Term("the teacher's probability whose token of the student cannot be told"),
}
"""Metrics of `evaluate`, in the order in which they are shown."""

HEALTH: dict[str, str] = {
    "rollouts": "texts that the student wrote",
    "feedback": "of those, with something to learn from",
    "feedback_failed": "share of replies that could not be used",
    "unchanged": "share of drafts that are word for word what the teacher wrote",
    "staleness": "rounds that the writer is behind the student that learns",
    "kl_to_start": "how far the writer has moved from sft, nats a token",
    "rollout_entropy": "how undecided it is at each token, nats; towards 0 it writes one text only",
    "rollout_logprob": "log-probability of what it wrote, nats a token",
    "rollout_length": "tokens of a text",
    "rollout_cut_off": "share of texts that ran into the limit",
    "rollout_logprob_gap": "between the log-probs it was drawn with and those it has, nats a token",
    "distinct_2": "different word pairs over all word pairs, in all texts together",
    "replayed": "teacher answers mixed into the update",
    "dropped_answers": "share of texts whose answers by the teacher curation left out",
    "reward": "mean reward",
    "reward_spread": "deviation of rewards within the texts of one prompt",
    "groups_equal": "share of prompts whose texts were all rewarded alike: nothing to learn",
    "reward_length_correlation": "near 1 the judge pays for length",
    "judge_reward": "mean reward by the judge that is learnt from",
    "unseen_reward": "mean reward by the judge that is not",
    "judge_difference": "between the two",
    "judge_rank_correlation": "how alike the two judges rank",
}
"""Numbers of a round, in the order in which they are shown; others follow by name."""


def better(name: str) -> Better:
    """Which way a metric of `evaluate` is better."""
    if name.startswith("task_"):
        return "lower" if name.endswith("_drop") else "higher"
    return GLOSSARY[name].better if name in GLOSSARY else ""


def meaning(name: str) -> str:
    """A metric in words; '' for one that is not known here."""
    return GLOSSARY[name].meaning if name in GLOSSARY else HEALTH.get(name, "")


MINUS, DASH, THIN_SPACE = "\u2212", "\u2013", "\u202f"


def number(value: float | int | None) -> str:
    """Three digits that count, thousands apart, a real minus; a dash where there is none."""
    if value is None:
        return DASH
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{round(value):,}".replace(",", THIN_SPACE).replace("-", MINUS)
    return f"{value:.3g}".replace("-", MINUS)


def signed(value: float) -> str:
    """With its sign, to a tenth."""
    return f"{value + 0.0:+.1f}".replace("-", MINUS) if round(value, 1) else "0"


def interval(found: Mapping[str, Any]) -> str:
    """`[lo, hi]`; '' where there is none."""
    return "" if found.get("lo") is None else f"[{number(found['lo'])}, {number(found['hi'])}]"


def dollars(value: float | None) -> str:
    """Cents, and the first fractions of one; 'unknown' where no price is known."""
    if value is None:
        return "unknown"
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}" if value else "$0"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


Measured = Mapping[str, Mapping[str, Any]]
"""checkpoint -> {value, lo, hi} of one metric, in the order of training."""


class Verdict(NamedTuple):
    """The answer to: did it work?"""

    headline: str
    detail: str


def verdict(metric: str, measured: Measured) -> Verdict:
    """The last checkpoint beside sft, or sft beside base, by held-out numbers of a metric that has a better way.

    Intervals that overlap settle nothing, and the words say so.
    """
    names = [name for name in measured if name != "teacher"]
    if len(names) < 2:
        return Verdict("Nothing to compare yet", "Fewer than two checkpoints have been evaluated.")
    last, before = names[-1], "sft" if "sft" in names[:-1] else names[0]
    now, then = measured[last], measured[before]
    gain = (then["value"] - now["value"]) * (1 if better(metric) == "lower" else -1)
    how = "nearer to its teacher than" if gain > 0 else "further from its teacher than"
    how = how if gain else "as far from its teacher as"
    apart = now["hi"] < then["lo"] or then["hi"] < now["lo"]
    doubt = "" if apart or not gain else ", but within the uncertainty"
    detail = f"On held-out prompts {metric} is {_shown(now)} for {last} and {_shown(then)} for {before}."
    if names[0] not in (last, before):
        detail += f" It was {_shown(measured[names[0]])} for {names[0]}."
    best = (min if better(metric) == "lower" else max)(names, key=lambda name: measured[name]["value"])
    if best not in (last, before):
        detail += f" The best is {best} with {_shown(measured[best])}."
    return Verdict(f"{last} is {how} {before}{doubt}", f"{detail} {_certainty(apart, last, before)}")


def _shown(found: Mapping[str, Any]) -> str:
    return f"{number(found['value'])} {interval(found)}"


def _certainty(apart: bool, last: str, before: str) -> str:
    if apart:
        return "The two 95% intervals do not overlap."
    return f"The two 95% intervals overlap: this alone does not tell {last} from {before}."


def holdback_words(chrf: Measured) -> str:
    """How far the last checkpoint's answers to hold-back prompts are from the base model's; '' where none are."""
    names = [name for name in chrf if name not in ("teacher", "base")]
    if not names:
        return ""
    return f"On hold-back prompts {names[-1]}'s answers are {_shown(chrf[names[-1]])} of 100 like those of base (chrf)."


def gate_words(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """What the gates say, in a sentence; '' where there are none."""
    failed = [task for task, gate in gates.items() if not gate["passed"]]
    if not gates:
        return ""
    if failed:
        return f"It fails {len(failed)} of {len(gates)} gates: {', '.join(failed)} got worse by more than is allowed."
    return f"It passes {'its gate' if len(gates) == 1 else f'all {len(gates)} gates'}: {', '.join(gates)}."


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else list(parts))

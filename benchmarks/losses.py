"""Step time and peak memory of the losses, beside F.cross_entropy on the same logits; one JSON object.

    python benchmarks/losses.py --json

Forward and backward on a CPU in float32, 256 rows of 128,256 logits (Llama 3's vocabulary), K = 20. Ratios of medians
of CPU seconds; the arms alternate, on one thread, because other work on shared cores makes threads wait for each other.
  time_ratio_vs_ce, memory_ratio_vs_ce        topk_kl (forward KL with its bucket); `_jsd` at beta = 0.5
  time_ratio_dense_vs_ce, memory_ratio_...    the dense forward KL of two whole distributions, by F.kl_div
  time_ratio_hard_vs_ce, memory_ratio_...     our cross_entropy
  time_ratio_trl_vs_ce, memory_ratio_...      TRL's fused divergence, which projects the hidden states (512 wide) of
                                              student and teacher itself and makes no logits, against F.cross_entropy on
                                              projected hidden states. `_topk_head`: topk_kl against the same
  align_tokens_per_s                          of benchmarks/align.py, one core
Memory is the peak (VmHWM, so on Linux) of a fresh process after one step, less its peak once the arm's inputs (logits;
teacher's whole log-probabilities; hidden states and heads) are there: what the loss and its gradients add.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
import torch.nn.functional as F

from blackbox_kd.losses import cross_entropy, topk_kl

ROWS, VOCAB, K, WIDTH = 256, 128_256, 20, 512

Step = Callable[[], torch.Tensor]
"""One forward: the loss to go back from."""


def _filled(*shape: int, requires_grad: bool = True) -> torch.Tensor:
    """Random numbers, made in place: what is measured is not hidden below a peak from before."""
    return torch.empty(*shape).normal_(0, 2).requires_grad_(requires_grad)


def _soft(rows: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (unique in a row) and log-probabilities of a top-k with a mass of 0.9, and a mask."""
    ids = (torch.randint(vocab, (1, rows, 1)) + torch.arange(K) * (vocab // K)) % vocab
    return ids, (_filled(1, rows, K, requires_grad=False).softmax(-1) * 0.9).log(), torch.ones(1, rows)


def _ce(rows: int, vocab: int) -> Step:
    logits, targets = _filled(rows, vocab), torch.randint(vocab, (rows,))
    return lambda: F.cross_entropy(logits, targets)


def _hard(rows: int, vocab: int) -> Step:
    logits, targets = _filled(1, rows, vocab), torch.randint(vocab, (1, rows))
    return lambda: cross_entropy(logits, targets, torch.ones(1, rows), normalizer=rows).loss


def _topk(rows: int, vocab: int, beta: float = 0.0) -> Step:
    logits, soft = _filled(1, rows, vocab), _soft(rows, vocab)
    return lambda: topk_kl(logits, *soft, beta=beta).loss


def _dense(rows: int, vocab: int) -> Step:
    logits, teacher = _filled(rows, vocab), _filled(rows, vocab, requires_grad=False)
    for row in teacher:
        row -= row.logsumexp(-1)
    return lambda: F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)


def _head(rows: int, vocab: int, *, frozen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a head, which a LoRA leaves as it is; a teacher's states have no gradient, either."""
    return _filled(rows, WIDTH, requires_grad=not frozen), _filled(vocab, WIDTH, requires_grad=False).div_(50)


def _ce_head(rows: int, vocab: int) -> Step:
    (hidden, head), targets = _head(rows, vocab, frozen=False), torch.randint(vocab, (rows,))
    return lambda: F.cross_entropy(hidden @ head.T, targets)


def _topk_head(rows: int, vocab: int) -> Step:
    (hidden, head), soft = _head(rows, vocab, frozen=False), _soft(rows, vocab)
    return lambda: topk_kl((hidden @ head.T)[None], *soft, beta=0.0).loss


def _trl(rows: int, vocab: int) -> Step:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    (student, head), (teacher, its_head) = (_head(rows, vocab, frozen=frozen) for frozen in (False, True))
    return lambda: _chunked_divergence_loss(
        student[None], teacher[None], head, its_head, torch.ones(1, rows), beta=0.0
    )[0]  # fmt: skip


ARMS: dict[str, Callable[[int, int], Step]] = {
    "ce": _ce,
    "hard": _hard,
    "topk": _topk,
    "topk_jsd": lambda rows, vocab: _topk(rows, vocab, beta=0.5),
    "dense": _dense,
    "ce_head": _ce_head,
    "topk_head": _topk_head,
    "trl": _trl,
}

RATIOS = {  # name in the result -> arm, and what it is measured against
    "_vs_ce": ("topk", "ce"),
    "_jsd_vs_ce": ("topk_jsd", "ce"),
    "_dense_vs_ce": ("dense", "ce"),
    "_hard_vs_ce": ("hard", "ce"),
    "_trl_vs_ce": ("trl", "ce_head"),
    "_topk_head_vs_ce": ("topk_head", "ce_head"),
}


def _seconds(step: Step) -> float:
    started = time.process_time()
    step().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - started


def times(arms: list[str], rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step, arms in turn; the first turn, which warms up, is left out. Gradients are made anew."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(repeats + 1):
        for arm in arms:
            torch.manual_seed(turn)
            seconds = _seconds(ARMS[arm](rows, VOCAB))
            if turn:
                found[arm].append(seconds)
        print(f"turn {turn}: " + ", ".join(f"{a} {found[a][-1]:.3f} s" for a in arms if turn), file=sys.stderr)
    return found


def memory_here(arm: str, rows: int) -> int:
    """Bytes that one step adds to this process's peak. Code and thread pools are loaded before, by a small step."""
    ARMS[arm](2, 2 * K)().backward()  # type: ignore[no-untyped-call]
    step = ARMS[arm](rows, VOCAB)
    before = _peak()
    step().backward()  # type: ignore[no-untyped-call]
    return _peak() - before


def _peak() -> int:
    """Bytes; ru_maxrss would begin with the peak of the process that started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def memory(arm: str, rows: int, threads: int) -> int:
    """`memory_here` of a fresh process."""
    command = [sys.executable, __file__, "--memory-of", arm, "--rows", str(rows), "--threads", str(threads)]
    found = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{arm}: {found / 2**20:.0f} MiB more", file=sys.stderr)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--repeats", type=int, default=9, help="of each arm with a head; three times as many of the others"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=ARMS, help="prints the bytes that one step of this arm adds")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    if flags.memory_of:
        print(memory_here(flags.memory_of, flags.rows))
        return 0
    small = [arm for arm in ARMS if not arm.endswith("head") and arm != "trl"]
    seconds = times(small, flags.rows, 3 * flags.repeats)
    seconds |= times([arm for arm in ARMS if arm not in small], flags.rows, flags.repeats)
    medians = {arm: statistics.median(runs) for arm, runs in seconds.items()}
    bytes_added = {arm: memory(arm, flags.rows, flags.threads) for arm in ARMS}
    found: dict[str, Any] = {f"time_ratio{n}": medians[arm] / medians[base] for n, (arm, base) in RATIOS.items()}
    found |= {f"memory_ratio{n}": bytes_added[arm] / bytes_added[base] for n, (arm, base) in RATIOS.items()}
    found["align_tokens_per_s"] = _align()
    settings = {"rows": flags.rows, "vocab": VOCAB, "k": K, "width": WIDTH, "repeats": flags.repeats,
                "threads": flags.threads, "cores": os.cpu_count(), "torch": torch.__version__}  # fmt: skip
    if flags.json:
        seconds = {arm: [round(run, 3) for run in runs] for arm, runs in seconds.items()}
        raw = {"seconds": seconds, "bytes_added": bytes_added, "logits_bytes": 4 * flags.rows * VOCAB}
        print(json.dumps({**found, "settings": settings, "raw": raw}, indent=1))
    else:
        print("\n".join(f"{name:32} {value}" for name, value in found.items()))
    return 0


def _align() -> float | None:
    """None where the packages are not there that its tokenizers come from."""
    try:
        from align import align_tokens_per_s
    except ModuleNotFoundError as error:
        print(f"align_tokens_per_s is left out: {error}", file=sys.stderr)
        return None
    return float(align_tokens_per_s())


if __name__ == "__main__":
    sys.exit(main())

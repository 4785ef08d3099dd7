"""Is anything lost, or paid for twice, when `sample` is killed at random moments?

    python benchmarks/kill.py --kills 200 --json

`blackbox-kd sample` collects short answers from a server in a process of its own, dies by SIGKILL (while it asks, or
somewhere in its start: imports, replay of the journal, opening the corpus), starts again, ..., and finishes. Each
answer names the call that it came from, and three witnesses are compared: the server's ledger, receipts that the
client writes the moment its transport has an answer (witness.py), and the corpus at the end.

  received          answers that the client's transport handed over, over all processes
  in_flight_at_kill calls that were billed but can be no row: the process died before it had the answer, or within
                    HANDOVER_S after (that is the way from the socket to the journal; `handed_over_at_kill` of them)
  lost              received, not in flight at a kill, and not in the corpus
  billed_twice      billed calls beyond one a question, those in flight at a kill set aside
  uncounted         in flight at a kill, but not among the attempts that the corpus shows as `billed IS NULL`

--self-test deletes the journal at each kill: then `lost` and `billed_twice` must not be 0.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from servers import Event, Options, read_ledger, server
from witness import read_receipts

from blackbox_kd.corpus import query

HANDOVER_S = 0.05
"""From the receipt of an answer to its journal record: decoding, on a machine where others work too."""
UNREAD_S = 2.0
"""How long an answer may lie in the socket of a busy client; one that lies longer was not in flight but forgotten."""
START_SHARE = 0.25
"""Of the kills: at any moment since the start of the process, the others while it asks."""
MORE_PROMPTS = 1500
"""Added whenever everything is answered before the next kill."""


def verdict(
    events: Iterable[Event], receipts: Mapping[int, float], killed_at: Mapping[str, float], stored: set[int],
    unknown: Mapping[str, int],
) -> dict[str, int]:  # fmt: skip
    """The keys that the module explains.

    `receipts`: serial -> when; `killed_at`: generation -> when; `stored`: serials of the answers in the corpus;
    `unknown`: question -> attempts of which the corpus says that nobody knows.
    """
    billed = [event for event in events if event.event in ("answered", "dropped")]

    def in_flight(event: Event) -> bool:
        killed = killed_at.get(event.generation)
        if killed is None or event.serial in stored:
            return False
        received = receipts.get(event.serial)
        return event.at > killed - UNREAD_S if received is None else received > killed - HANDOVER_S

    dying = [event for event in billed if in_flight(event)]
    serials = {event.serial for event in dying}
    kept = Counter(event.content for event in billed if event.serial not in serials)
    return {
        "received": len(receipts),
        "lost": len(receipts.keys() - serials - stored),
        "billed_twice": sum(kept.values()) - len(kept),
        "in_flight_at_kill": len(serials),
        "handed_over_at_kill": len(serials & receipts.keys()),
        "uncounted": (Counter(event.content for event in dying) - Counter(unknown)).total(),
    }


class Client:
    """`sample`, started again and again on the same project."""

    def __init__(self, folder: Path, url: str) -> None:
        self.corpus, self._prompts = folder / "corpus.duckdb", folder / "train.jsonl"
        self._folder, self._config = folder, folder / "project.json"
        self.questions = self.starts = 0
        project = {
            "run_dir": str(folder / "run"),
            "corpus": str(self.corpus),
            "prompts": {"path": str(self._prompts)},
            "teacher": {"provider": "openai", "model": "fake", "base_url": url, "api_key_env": None,
                        "concurrency": 32, "extra_headers": {"x-generation": "$GENERATION"}},
            "sample": {"max_completion_length": 20, "top_logprobs": 5},
            "student": {"model": "none"},
            "onpolicy": {"algorithm": {"name": "relabel"}},
        }  # fmt: skip
        self._config.write_text(json.dumps(project))
        self.add_prompts()

    def add_prompts(self) -> None:
        """More work."""
        with self._prompts.open("a") as file:
            for number in range(self.questions, self.questions + MORE_PROMPTS):
                file.write(json.dumps({"prompt": f"Question {number}"}) + "\n")
        self.questions += MORE_PROMPTS

    @property
    def generation(self) -> str:
        """Name of the last process; long, because the values of extra headers are masked in replies, as keys are."""
        return f"generation-{self.starts:05}"

    def start(self) -> subprocess.Popen[bytes]:
        """A new process of the next generation."""
        self.starts += 1
        environment = os.environ | {"WITNESS": str(self._folder), "GENERATION": self.generation}
        command = [sys.executable, str(Path(__file__).with_name("witness.py")), "sample"]
        command += ["--config", str(self._config)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finish(self) -> None:
        """Run to the end."""
        process = self.start()
        said = process.communicate()[1].decode()
        if process.returncode:
            raise SystemExit(f"sample ended with {process.returncode}: {said}")

    def stored(self) -> set[int]:
        """Serials of the answers in the corpus."""
        return {int(text.split()[1]) for (text,) in query(self.corpus, "SELECT text FROM completions")[1]}

    def unknown(self) -> dict[str, int]:
        """Question -> attempts that were in flight when a process died."""
        select = """SELECT json_extract_string(body, '$.messages[0].content'), count(*)
                    FROM attempts JOIN requests USING (request_key) WHERE billed IS NULL GROUP BY 1"""
        return dict(query(self.corpus, select)[1])


def kill_once(client: Client, ledger: Path, rng: random.Random) -> float | None:
    """Start the client and kill it at a random moment: when that was; None where it was done before."""
    asked, process = ledger.stat().st_size, client.start()
    assert process.stderr is not None
    if rng.random() < START_SHARE:
        time.sleep(rng.uniform(0.0, 2.0))
    else:
        while ledger.stat().st_size == asked and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 1.0))
    killed = time.monotonic()
    process.kill()
    said = process.communicate()[1].decode()
    if process.returncode > 0:
        raise SystemExit(f"sample ended with {process.returncode}: {said}")
    return killed if process.returncode else None


def torture(folder: Path, kills: int, *, seed: int, sabotage: bool) -> dict[str, Any]:
    """All kills, the last run to the end, and the verdict."""
    rng, killed_at, ledger = random.Random(seed), dict[str, float](), folder / "ledger.jsonl"
    with server(Options(tokens=20, top=5, latency_s=0.05, ledger=str(ledger))) as api:
        client = Client(folder, api.url)
        while len(killed_at) < kills:
            killed = kill_once(client, ledger, rng)
            if killed is None:
                client.add_prompts()
                continue
            killed_at[client.generation] = killed
            print(f"kill {len(killed_at)} of {kills}", file=sys.stderr, flush=True)
            if sabotage:
                shutil.rmtree(f"{client.corpus}.journal", ignore_errors=True)
        client.finish()
    events, receipts, unknown, stored = read_ledger(ledger), read_receipts(folder), client.unknown(), client.stored()
    for event in events:
        if event.event == "answered" and event.serial in receipts.keys() - stored:
            before_s = killed_at.get(event.generation, 0.0) - receipts[event.serial]
            print(f"call {event.serial} is no row; received {before_s:.3f} s before the kill", file=sys.stderr)
    found = verdict(events, receipts, killed_at, stored, unknown)
    return {"kills": kills, **found, "questions": client.questions, "answers": len(stored), "starts": client.starts,
            "unknown_attempts": sum(unknown.values())}  # fmt: skip


def main() -> int:
    """The command; 1 where an answer was lost or paid for twice (in a self-test: where that was not noticed)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--self-test", action="store_true", help="lose answers on purpose")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    flags = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = torture(Path(folder), flags.kills, seed=flags.seed, sabotage=flags.self_test)
    print(json.dumps(found) if flags.json else "\n".join(f"{name:20} {value}" for name, value in found.items()))
    wrong = found["lost"] + found["billed_twice"] + found["uncounted"] + found["questions"] - found["answers"]
    return int(bool(wrong) != flags.self_test)


if __name__ == "__main__":
    sys.exit(main())

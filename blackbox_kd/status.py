"""`status`: what the corpus holds, what each run was billed, and how far it is."""

from __future__ import annotations

import json
import sys
from typing import Any

from blackbox_kd.corpus import query
from blackbox_kd.project import OneLineParser, guarded
from blackbox_kd.sql import add_corpus_flag, corpus_of, show

QUESTIONS = {
    "answers": "SELECT author, purpose, round, count(*) AS answers FROM completions JOIN requests USING (request_key) "
    "GROUP BY ALL ORDER BY ALL",
    "unanswered": "SELECT 'pending' AS state, count(*) AS requests FROM pending UNION ALL "
    "SELECT 'dead letters', count(*) FROM dead_letters",
    "spend": "SELECT run_dir, model, sum(calls)::BIGINT AS calls, sum(billed)::BIGINT AS billed, "
    "sum(unknown)::BIGINT AS unknown, sum(prompt_tokens)::BIGINT AS prompt_tokens, "
    "sum(completion_tokens)::BIGINT AS completion_tokens, sum(cost_usd) AS cost_usd "
    "FROM (SELECT * EXCLUDE (model) FROM spend) JOIN runs USING (run_id) GROUP BY ALL ORDER BY ALL",
    "heldout": "SELECT run_dir, checkpoint, name, round(value, 3) AS value, round(lo, 3) AS lo, round(hi, 3) AS hi "
    "FROM leaderboard JOIN runs USING (run_id) WHERE split = 'heldout' AND name IN ('teacher_nll', 'chrf')",
}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = OneLineParser(prog="blackbox-kd status", description=__doc__)
    add_corpus_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    flags = parser.parse_args(argv)

    def body() -> int:
        path = corpus_of(flags.corpus)
        found: dict[str, Any] = {}
        for name, sql in QUESTIONS.items():
            columns, rows = query(path, sql)
            found[name] = [dict(zip(columns, row, strict=True)) for row in rows]
            if not flags.json:
                print(f"\n{name}")
                show(columns, rows)
        if flags.json:
            print(json.dumps({"corpus": str(path), **found}, default=str))
        return 0

    return guarded(body, debug=flags.debug)


if __name__ == "__main__":
    sys.exit(main())

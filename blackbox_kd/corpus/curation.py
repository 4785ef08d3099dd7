"""The rows that curation leaves in the corpus."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blackbox_kd.corpus.connection import transaction
from blackbox_kd.corpus.ingest import insert, timestamp

if TYPE_CHECKING:
    from blackbox_kd.corpus.store import Corpus


def replace(corpus: Corpus, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A run's rows (completion_id, reason, detail, action) in place of those that it had; what stays keeps its date."""
    said = {(row["completion_id"], row["reason"]): row for row in rows}
    with corpus.connect() as con:
        known = {
            (completion_id, reason): (detail, action)
            for completion_id, reason, detail, action in con.execute(
                "SELECT completion_id::VARCHAR, reason, detail, action FROM curation WHERE run_id = ?::UUID", [run_id]
            ).fetchall()
        }
        gone = known.keys() - said.keys()
        new = [row for key, row in said.items() if known.get(key) != (row["detail"], row["action"])]
        now = timestamp(time.time())
        with transaction(con):
            con.execute(
                """DELETE FROM curation WHERE run_id = ?::UUID AND (completion_id::VARCHAR || reason) IN
                   (SELECT unnest(?::VARCHAR[]))""",
                [run_id, ["".join(key) for key in gone]],
            )
            insert(con, "curation", [{**row, "run_id": run_id, "created_at": now} for row in new], replace=True)


def dropped(corpus: Corpus, run_id: str) -> set[str]:
    """completion_ids that a run does not learn."""
    sql = "SELECT completion_id::VARCHAR FROM curation WHERE run_id = ?::UUID AND action = 'drop'"
    return {completion_id for (completion_id,) in corpus.rows(sql, [run_id])}


def summary(corpus: Corpus, run_id: str) -> list[dict[str, Any]]:
    """A run's verdicts by action and reason: how many, and the first one as an example."""
    names = ("action", "reason", "answers", "completion_id", "detail", "text")
    rows = corpus.rows(
        """SELECT v.action, v.reason, count(*), min(v.completion_id)::VARCHAR, min_by(v.detail, v.completion_id),
                  min_by(c.text, v.completion_id)
           FROM curation v JOIN completions c USING (completion_id) WHERE v.run_id = ?::UUID
           GROUP BY ALL ORDER BY v.action, count(*) DESC, v.reason""",
        [run_id],
    )
    return [dict(zip(names, row, strict=True)) for row in rows]

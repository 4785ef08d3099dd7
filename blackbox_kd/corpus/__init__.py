"""The corpus is the product: every call, sample, score and metric is a row in one DuckDB file.

Nothing outside this package speaks SQL. `schema.sql` says what is kept, `views.sql` how people read it.
"""

from blackbox_kd.corpus.connection import compact, export, query
from blackbox_kd.corpus.store import Corpus

__all__ = ["Corpus", "compact", "export", "query"]

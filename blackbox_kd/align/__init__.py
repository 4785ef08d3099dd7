"""A teacher's top-k in its own tokens -> soft labels in the student's. Pure: numpy only.

`aligner.py` says how, and what is exact; `spelling.py` reads what endpoints show of a token.
"""

from blackbox_kd.align.aligner import Aligner
from blackbox_kd.align.labels import SoftLabels, check_not_shifted
from blackbox_kd.align.spans import Span
from blackbox_kd.align.spelling import learn_end_ids
from blackbox_kd.align.vocab import StudentVocab, same_tokenizer

__all__ = ["Aligner", "SoftLabels", "Span", "StudentVocab", "check_not_shifted", "learn_end_ids", "same_tokenizer"]

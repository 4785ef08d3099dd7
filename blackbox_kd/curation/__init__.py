"""What of the teacher's answers is not worth learning, and why: pure rules over answers, and their part of the YAML."""

from blackbox_kd.curation.answer import Answer, Reason, Verdict
from blackbox_kd.curation.config import CurateConfig
from blackbox_kd.curation.rules import judged, remaining

__all__ = ["CurateConfig", "judged", "remaining", "Answer", "Verdict", "Reason"]

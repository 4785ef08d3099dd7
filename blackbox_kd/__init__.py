"""Distil a hosted teacher into a small LoRA student that learns from its own samples.

Reading path: `types` (what flows), `sample`, `sft`, `onpolicy`, `evaluate` (a stage is a page),
`teachers.engine` (how an endpoint is asked), `corpus.schema.sql` (what is kept).
"""

__version__ = "0.1.0"

"""Distil a hosted teacher into a small LoRA student that learns from its own samples.

Reading path: `types` (what flows), `sample` and `onpolicy` (a stage is a page), `algorithms.relabel` (an idea is a
file), `student.update` (what is learnt), `teachers.engine` (how an endpoint is asked).
"""

import os

# Must stand before torch is loaded. Its CPU threads spin while they wait for each other; where anything else wants
# a core, a training step that takes 3 s then takes up to 30 s, and 5 s if they sleep instead.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

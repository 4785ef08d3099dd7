"""The README.md of an adapter: what it is, where it comes from, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import yaml

if TYPE_CHECKING:
    from blackbox_kd.project import Project

CARD = jinja2.Template(
    """---
{{ front }}---

# {{ title }}

A LoRA adapter for `{{ base }}`, distilled from the answers of `{{ teacher }}` with blackbox_kd: {{ how }}.

- teacher: `{{ teacher }}` ({{ provider }}), private prompt {{ context_hash }}
- teacher calls so far: {{ spend.calls }}
- teacher tokens so far: {{ spend.prompt_tokens }} prompt, {{ spend.completion_tokens }} completion
- run: {{ run_id }}, seed {{ seed }}

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({{ source | tojson }}), "PATH_OF_THIS_FOLDER")
```

The terms of use of a hosted teacher may limit what a model trained on its answers may be used for.
"""
)


def write_card(folder: Path, project: Project, name: str, how: str, base: str) -> None:
    """Write README.md into a checkpoint folder."""
    from blackbox_kd.student.load import model_source

    source = model_source(base)
    config = project.config
    front = {"base_model": source, "library_name": "peft", "tags": ["lora", "distillation", "blackbox_kd", name],
             "pipeline_tag": "text-generation"}  # fmt: skip
    text = CARD.render(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{config.run_dir.name} {name}",
        base=base,
        source=source,
        teacher=config.teacher.model,
        provider=getattr(config.teacher, "provider", ""),
        context_hash=project.teacher.context.context_hash,
        how=how,
        spend=project.corpus.spend(project.run_id),
        run_id=project.run_id,
        seed=config.seed,
    )
    (folder / "README.md").write_text(text, "utf-8")

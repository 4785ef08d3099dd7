"""The README.md of an adapter: what it is, what it has learnt from, how good it is, how to load and to serve it.

Its front matter is what the Hub reads (https://huggingface.co/docs/hub/model-cards), and under `blackbox_kd` the facts
that the text is made of. `evaluate` writes what it found between two marks, and leaves the rest as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import ModelCardData

from blackbox_kd import __version__
from blackbox_kd.hashing import content_id
from blackbox_kd.run_dir import RunDir, write_atomically

if TYPE_CHECKING:
    from blackbox_kd.project import Project

CARD = jinja2.Template(
    """---
{{ front }}
---

# {{ facts.name }}

A LoRA adapter for `{{ facts.base }}`, distilled from the answers of `{{ facts.teacher }}` with
blackbox_kd {{ facts.version }}: {{ facts.how }}.

| | |
|---|---|
| base | `{{ facts.base }}` |
| teacher | `{{ facts.teacher }}` (provider {{ facts.provider }}), private prompt {{ facts.context_hash }} |
{%- for what, count in facts.data.items() %}
| {{ what }} | {{ count }} |
{%- endfor %}
| hash of the ids of what it learnt | {{ facts.data_hash }} |
| run, seed | {{ facts.run_id }}, {{ facts.seed }} |

{{ measured }}
## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({{ facts.source | tojson }})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({{ facts.source | tojson }}), ".")  # this folder
```

As an OpenAI-compatible endpoint, where it is the model `student`:

```bash
vllm serve {{ facts.source }} --enable-lora --max-lora-rank {{ facts.max_lora_rank }} --lora-modules student=.
```

It answers prompts as they were in training, without the teacher's private prompt.

## Licence

No licence is set here. The adapter stands under the licence of its base model, and the terms of use of the teacher may
limit what a model trained on its answers may be used for: read both before you pass it on.
""",
    undefined=jinja2.StrictUndefined,
)

MEASURED = jinja2.Template(
    """<!-- measured -->
## Metrics
{% if metrics %}
Value and 95% interval over prompts, on the fixed set {{ set_id }}.
`teacher_nll` and `tail_kl` are nats a token, lower is better; `chrf` is 0 to 100, shares are 0 to 1.

| split | metric | value | interval |
|---|---|--:|--:|
{%- for split, name, m in metrics %}
| {{ split }} | `{{ name }}` | {{ "%.4g" | format(m.value) }} | {{ "[%.4g, %.4g]" | format(m.lo, m.hi) }} |
{%- endfor %}
{% else %}
Not evaluated yet: `blackbox-kd evaluate` writes them here.
{% endif %}
## Spend

The run so far{{ ", evaluation included" if metrics }}: {{ spend.calls }} calls to the teacher,
{{ spend.prompt_tokens }} prompt and {{ spend.completion_tokens }} completion tokens,
{{ "a price is not known" if spend.cost_usd is none else "$%.4f" | format(spend.cost_usd) }}.
<!-- /measured -->
""",
    undefined=jinja2.StrictUndefined,
)
"""What an evaluation writes anew."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be: https://docs.vllm.ai/en/latest/cli/serve.html"""


def write_card(folder: Path, project: Project, name: str, how: str, data: Mapping[str, int], learnt: list[str]) -> None:
    """Write README.md into a checkpoint folder.

    `data` counts what it has learnt since the checkpoint before it, `learnt` names that by completion_id, in any order.
    """
    from blackbox_kd.student.load import model_source

    config = project.config
    source = model_source(config.student.model)
    facts: dict[str, Any] = {
        "name": f"{config.run_dir.name} {name}",
        "version": __version__,
        "base": config.student.model,
        "source": source,
        "teacher": config.teacher.model,
        "provider": getattr(config.teacher, "provider", ""),
        "context_hash": project.teacher.context.context_hash,
        "how": how,
        "data": dict(data),
        "data_hash": content_id(sorted(set(learnt))),
        "run_id": project.run_id,
        "seed": config.seed,
        "max_lora_rank": next((rank for rank in VLLM_RANKS if rank >= config.student.lora.r), config.student.lora.r),
    }
    base = facts["base"]
    front = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "distillation", "blackbox_kd"],
        **({"base_model": base, "base_model_relation": "adapter"} if is_hub_id(base) else {}),
        blackbox_kd=facts,
    )
    found = MEASURED.render(spend=project.corpus.spend(project.run_id), metrics=(), set_id="")
    write_atomically(folder / "README.md", CARD.render(front=front.to_yaml(), facts=facts, measured=found))


def refresh_cards(run_dir: RunDir, summary: Mapping[str, Any]) -> None:
    """Write what `evaluate` found into the cards of the checkpoints that it measured; nothing else of them changes."""
    for name in run_dir.checkpoints():
        card = run_dir.checkpoint(name) / "README.md"
        metrics = [
            (row["split"], metric, value)
            for row in summary["checkpoints"]
            for metric, value in row["metrics"].items()
            if row["name"] == name and "_decile_" not in metric
        ]
        found = MEASURED.render(spend=summary["spend"], metrics=metrics, set_id=summary["set_id"])
        text = card.read_text("utf-8") if card.exists() else ""
        before, opened, rest = text.partition("<!-- measured -->")
        _, closed, after = rest.partition("<!-- /measured -->")
        if opened and closed:
            write_atomically(card, before + found + after)


def is_hub_id(base: str) -> bool:
    """Whether the Hub may know it: `owner/name`, and not a folder or a file here."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists() and ":" not in base

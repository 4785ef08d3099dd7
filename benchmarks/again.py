"""What a second `sample` asks: one call for one new prompt, none for what is only called otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from servers import Options, server

TEMPLATE = "Answer in one word."


def calls_again(count: int) -> dict[str, int]:
    """`calls_added_prompt` after one more prompt, `calls_renamed` after another base_url, run and template name."""
    with TemporaryDirectory() as folder, server(Options(tokens=4)) as api:
        root = Path(folder)
        (root / "rules.md.j2").write_text(TEMPLATE)
        (root / "the_same_rules.md.j2").write_text(TEMPLATE)
        prompts = [json.dumps({"prompt": f"Question {i}"}) for i in range(count)]
        config = _config(root, api.url)
        asked = [_sample(root, prompts, config, api)]
        asked.append(_sample(root, [*prompts, json.dumps({"prompt": "one more"})], config, api))
        config["teacher"] |= {"base_url": api.url.replace("127.0.0.1", "localhost"),
                              "prompt": {"template": str(root / "the_same_rules.md.j2")}}  # fmt: skip
        asked.append(_sample(root, prompts, config | {"run_dir": str(root / "another")}, api))
    if asked[0] != count:
        raise RuntimeError(f"{asked[0]} calls for {count} questions")
    return {"calls_added_prompt": asked[1], "calls_renamed": asked[2]}


def _config(root: Path, url: str) -> dict[str, Any]:
    return {
        "run_dir": str(root / "run"), "corpus": str(root / "corpus.duckdb"), "prompts": {"path": str(root / "p.jsonl")},
        "teacher": {"provider": "openai", "model": "m", "base_url": url, "api_key_env": None, "concurrency": 64,
                    "prompt": {"template": str(root / "rules.md.j2")}},
        "sample": {"max_completion_length": 4, "top_logprobs": None}, "student": {"model": "none"},
        "onpolicy": {"algorithm": {"name": "relabel"}},
    }  # fmt: skip


def _sample(root: Path, prompts: list[str], config: dict[str, Any], api: Any) -> int:
    """Calls that the server received."""
    (root / "p.jsonl").write_text("\n".join(prompts) + "\n")
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    before = api.stats()["received"]
    command = [sys.executable, "-m", "blackbox_kd", "sample", "--config", str(root / "config.yaml"), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return int(api.stats()["received"]) - int(before)

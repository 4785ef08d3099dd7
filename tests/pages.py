"""README.md and docs/: the blocks that stand in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
"""Text by path from the root."""


class Block(NamedTuple):
    """A fenced block."""

    page: str
    heading: str
    """The last one above it."""
    text: str
    result: str
    """The ```text block that follows it at once; empty where there is none."""

    def __str__(self) -> str:
        return f"{self.page}:{self.text.strip().splitlines()[0][:60]}"


def blocks(language: str, page: str = "") -> list[Block]:
    """All with this info string (`python`, `yaml`, ...), of one page or of all, in their order."""
    found = []
    for name, text in sorted(PAGES.items()):
        if page in ("", name):
            for match in re.finditer(rf"^```{language}\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.M | re.S):
                heading = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)[-1]
                found.append(Block(name, heading, match.group(1), match.group(2) or ""))
    return found


def lines(language: str, start: str) -> list[str]:
    """Lines of all such blocks that begin with `start`, each once and with what a backslash carries over."""
    text = "\n".join(block.text for block in blocks(language)).replace("\\\n", " ")
    return list(dict.fromkeys(line for line in text.splitlines() if line.startswith(start)))


def marked(name: str) -> str:
    """What is fenced between `<!-- name -->` and `<!-- /name -->`, wherever that is."""
    pattern = rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```\n<!-- /{re.escape(name)} -->"
    (found,) = [match for text in PAGES.values() for match in re.findall(pattern, text, re.DOTALL)]
    return str(found)


def anchors(text: str) -> set[str]:
    """What a link to a part of this page may name (as GitHub makes it of a heading)."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def install(site: Path, module: str, source: str, pyproject: str) -> Path:
    """A folder with a module and its entry point, as a package manager would have put it there."""
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    entry = re.search(r'"(.*?)"\]\n(.*)', pyproject)
    assert entry
    (metadata / "entry_points.txt").write_text(f"[{entry.group(1)}]\n{entry.group(2).replace(chr(34), '')}\n")
    return site

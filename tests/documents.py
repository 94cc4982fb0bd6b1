"""The documents of the project and the code blocks in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:<!-- (needs [^>]*) -->)?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what it needs that a test has not (real images, a GPU, hours)."""

    language: str
    text: str
    needs: str

    def commands(self) -> list[list[str]]:
        """Return the words of every command, comments left out, continued lines and quoted ones joined."""
        commands, text = [], ""
        for line in self.text.replace("\\\n", " ").splitlines():
            text += line
            if text.count('"') % 2:  # goes on
                text += "\n"
                continue
            commands.append(shlex.split(text, comments=True))
            text = ""
        assert not text, f"no closing quotation: {text}"
        return [words for words in commands if words]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    found = [Block(*match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if language in (None, block.language)]


def run_python(page: Path) -> dict:
    """Run the Python blocks of a page, one after the other as a reader would, and return what they define."""
    space = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block.text, page.name, "exec"), space)
    return space

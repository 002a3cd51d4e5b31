"""The Markdown pages of the docs, and the code blocks in them.

Directly before a block a comment may say how the tests treat it:

    <!-- not run: needs a GPU -->
    <!-- run with: dinov2_s14 -> backbone.name=demo -->
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.running import ROOT

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.+) -->")
RUN_WITH = re.compile(r"<!-- run with: (?P<shown>.+) -> (?P<instead>.+) -->")
FILE = re.compile(r"# (?P<name>[\w.-]+\.(?:yaml|py))$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; one in Python is a program of its own."""

    page: Path
    line: int
    language: str
    text: str
    comment: str  # the comment directly before it, or ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in ("shell", "python") and not NOT_RUN.fullmatch(self.comment)

    @property
    def commands(self) -> str:
        """What is run: the block with the words replaced that its comment names."""
        replaced = RUN_WITH.fullmatch(self.comment)
        if not replaced:
            return self.text
        assert replaced["shown"] in self.text, f"{self.where}: {replaced['shown']!r} is not in the block"
        return self.text.replace(replaced["shown"], replaced["instead"])

    @property
    def file(self) -> str | None:
        """The name of the file that a block of YAML or Python is written to."""
        first = FILE.match(self.text.split("\n", 1)[0])
        return first["name"] if self.language in ("yaml", "python") and first else None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").split("\n")
    number = 0
    while number < len(lines):
        start = FENCE.match(lines[number])
        if start:
            end = lines.index(f"{start['indent']}```", number + 1)
            text = textwrap.dedent("\n".join(lines[number + 1 : end]))
            before = lines[number - 1].strip() if number else ""
            comment = before if before.startswith("<!--") else ""
            found.append(Block(page, number + 1, start["language"], text, comment))
            number = end
        number += 1
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks and the code in its lines."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)

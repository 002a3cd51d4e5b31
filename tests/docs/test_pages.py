"""The pages hold together: links resolve, the reference is up to date, the README is short, the words are right."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest
import yaml

from tests.docs.pages import PAGES, README, blocks, prose
from tests.running import ROOT

LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<title>.+)$", re.MULTILINE)
MOST_WORDS = 1500
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
# Words that the docs once had for things with better names, and British spellings.
AVOIDED = re.compile(
    r"\b(mend\w*|told|meets|claims?|licences?|behaviours?|centres?|colours?"
    r"|(normal|optim|initial|synchron|serial|quant|minim|summar|organ|recogn|general|parallel)is(e|ed|es|er|ing|ation)s?)\b",
    re.IGNORECASE,
)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = (found["title"] for found in HEADING.finditer(page.read_text(encoding="utf-8")))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for found in LINK.finditer(prose(page)):
        target, _, anchor = found["target"].partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.is_file(), f"{page}: {found['target']}"
        assert not anchor or anchor in anchors(path), f"{page}: {found['target']}"


def test_every_page_is_in_the_navigation() -> None:
    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [file for value in values for file in files(value)]  # type: ignore[attr-defined]

    nav = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    notebooks = (ROOT / "docs" / "notebooks").glob("*.ipynb")
    pages = [*(page for page in PAGES if page != README), *notebooks]
    assert sorted(nav) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in pages)


@pytest.mark.slow
def test_the_reference_is_up_to_date() -> None:
    script = [sys.executable, str(ROOT / "tools" / "make_reference.py"), "--check"]
    this_checkout = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, cwd=ROOT, env=this_checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_words(page: Path) -> None:
    assert not [match[0] for match in AVOIDED.finditer(prose(page))]


def sources() -> list[str]:
    """All text in the package's strings, and the scripts for Slurm."""
    found = [path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.sh")]
    for path in (ROOT / "dist_vpt").rglob("*.py"):
        strings = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.JoinedStr)]
        found += ["".join(str(getattr(part, "value", "")) for part in string.values) for string in strings]
        found += [n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(n)]
    return found


def _is_text(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_messages_of_troubleshooting_exist() -> None:
    """What the first column quotes is in the package; ... stands for what differs."""
    rows = re.findall(r"^\| (.+?) \|", TROUBLESHOOTING.read_text(encoding="utf-8"), flags=re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    texts = sources()
    assert len(quoted) > 20
    parts = [part.strip() for quote in quoted for part in quote.split("...")]
    assert not [part for part in parts if not any(part in text for text in texts)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_yaml_blocks_are_yaml(page: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), block.where

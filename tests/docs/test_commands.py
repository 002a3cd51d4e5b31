"""Every block of the README and the guides in shell or Python runs, page by page, in an empty folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.docs.command_server import write_command
from tests.docs.pages import NOT_RUN, PAGES, RUN_WITH, Block, blocks
from tests.running import ROOT

pytestmark = pytest.mark.slow

ALL = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in ALL if block.is_run]
LEAST = 18  # blocks that run; a page that hides its commands from this test makes them fewer
SECONDS = 240  # of one block, on a busy machine
CLASSES = ("birds", "flags", "fruit")


def first_of_each() -> dict[Path, list[Block]]:
    """The blocks to run by page: what stands on two pages runs once, where it stands first."""
    seen: set[str] = set()
    pages: dict[Path, list[Block]] = {}
    for block in ALL:
        if block.file or (block.is_run and block.commands not in seen):
            pages.setdefault(block.page, []).append(block)
            seen.add(block.commands)
    return {page: found for page, found in pages.items() if any(block.is_run for block in found)}


def picture(kind: int, number: int) -> Image.Image:
    """Stripes that lean otherwise in each class."""
    y, x = np.mgrid[0:32, 0:32]
    phase = (x, y, x + y)[kind] + number
    return Image.fromarray(
        np.stack([8 * (phase % 32), 255 - 8 * (phase % 32), 0 * x + 9 * number], -1).astype(np.uint8)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder but for what the pages speak of: a folder of pictures, and a photo."""
    for kind, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(12):
            picture(kind, number).save(tmp_path / "pictures" / name / f"{number:03}.jpg")
    picture(1, 20).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """This checkout's package, its command on the PATH, no network. The package is imported once for all commands."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR")}
    bins, socket = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("server") / "socket"
    path = f"{bins}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    write_command(bins, socket)
    argv = [sys.executable, "-m", "tests.docs.command_server", str(socket)]
    with subprocess.Popen(argv, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield variables
        server.terminate()


@pytest.mark.parametrize("page", first_of_each(), ids=lambda page: page.stem)
def test_commands_run(page: Path, folder: Path, environment: dict[str, str]) -> None:
    for block in first_of_each()[page]:
        if block.file:
            (folder / block.file).write_text(block.text + "\n", encoding="utf-8")
            continue
        done = subprocess.run(
            ["dist-vpt", "python", block.commands]
            if block.language == "python"
            else ["bash", "-euo", "pipefail", "-c", block.commands],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{block.where}:\n{block.commands}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_command_is_installed() -> None:
    """The blocks above reach the package by another way."""
    command = Path(sys.executable).with_name("dist-vpt")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("dist-vpt "), done.stderr


def test_few_commands_are_left_out() -> None:
    assert len(RUN) >= LEAST, (
        f"only {len(RUN)} of {sum(block.language in ('shell', 'python') for block in ALL)} blocks run"
    )


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.where)
def test_a_block_is_marked_in_a_known_way(block: Block) -> None:
    """A misspelled comment would be passed over in silence; a language without a highlight, too."""
    assert block.language in ("bibtex", "python", "shell", "text", "yaml")
    assert not block.comment or NOT_RUN.fullmatch(block.comment) or RUN_WITH.fullmatch(block.comment), block.comment
    assert block.language in ("shell", "python") or not block.comment

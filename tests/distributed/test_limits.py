"""Limits of the system on a process: one message, by a command that has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import TINY, few_digits

LIMITED = (
    "import resource,sys; resource.setrlimit(getattr(resource, sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])));"
)
COMMAND = LIMITED + "from dist_vpt.cli.main import main; sys.exit(main(sys.argv[4:]))"


def limited(name: str, soft: int, hard: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, f"RLIMIT_{name}", str(soft), str(hard), "train", *TINY, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ, check=False)


@pytest.fixture
def words(tmp_path: Path) -> tuple[str, ...]:
    return (*few_digits(tmp_path / "data"), "run.trackers=[]", "method.name=linear", f"run.dir={tmp_path / 'run'}")


def test_too_few_open_files_are_named_before_anything_is_written(tmp_path: Path, words: tuple[str, ...]) -> None:
    ended = limited("NOFILE", 20, 20, *words, "data.workers=2")
    assert ended.returncode == 2
    assert ended.stderr == (
        "error: the system allows this process 20 open files, and data.workers = 2 needs up to 96; raise the limit "
        "before the command (ulimit -n 4096), or set data.workers=0\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_soft_limit_on_open_files_is_raised(words: tuple[str, ...]) -> None:
    ended = limited("NOFILE", 20, 200, *words, "data.workers=1")
    assert ended.returncode == 0, ended.stderr


def test_the_limit_on_the_size_of_a_file_is_named(words: tuple[str, ...]) -> None:
    ended = limited("FSIZE", 2000, 2000, *words, "data.workers=1")
    assert ended.returncode in (2, 3)
    assert "Traceback" not in ended.stderr
    advice = "the system allows files of 2,000 bytes at most; raise the limit before the command (ulimit -f unlimited)"
    assert advice in ended.stderr

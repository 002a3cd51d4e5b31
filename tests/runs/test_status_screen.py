"""`dist-vpt status` on a terminal of 80 x 24: what is shortened, what is left out, and how watching ends."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from dist_vpt.cli.status_screen import screen, shorten
from dist_vpt.runs.status import RunStatus
from tests.runs.test_status import ended

LONG = "runs/vpt_deep-on-oxford-iiit-pet-with-50-prompts-and-a-learning-rate-of-0.05"


def lines_of(found: list[RunStatus], width: int = 80, height: int | None = None) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(screen(found, ["runs"], width, height))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def a_run(name: str, status: str = "running", reason: str | None = None) -> RunStatus:
    return RunStatus(name, "run", status, reason, 1200, 31250, epoch=4, epochs=100, seconds_left=14520.0)


def test_a_name_loses_its_middle_and_each_run_has_one_line() -> None:
    lines = lines_of([a_run(LONG)])
    assert lines[-1].split("│")[0].strip() == "runs/vpt_deep…d-a-learning-rate-of-0.05"
    assert lines[-1].endswith("│ running │   3 %, epoch 4/100 │ 4:02:00")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert shorten("abcdefghij", 5, at_end=True) == "abcd…"


def test_a_wide_one_has_steps_and_speeds() -> None:
    fast = RunStatus("runs/a", "run", "running", None, 3, 9, epoch=1, epochs=2, images_per_s=12.34)
    assert lines_of([fast], width=120)[-1].split("│")[2:] == [" 3/9 steps, epoch 1/2 ", "      ", "     12.3"]


def test_sweeps_of_a_suite_are_below_it() -> None:
    suite = RunStatus("runs/s", "suite", "running", None, 0, 1, "sweeps")
    sweep = RunStatus("runs/s/svhn/vpt", "sweep", "running", None, 5, 8, "trials and seeds")
    table = lines_of([suite, sweep])[2:]
    assert [line.split("│")[0].rstrip() for line in table] == ["runs/s", "  svhn/vpt"]
    assert [line.split("│")[2].strip() for line in table] == ["0/1 sweeps", "5/8 trials"]


def test_more_than_fit_are_counted_and_those_in_need_are_shown() -> None:
    found = [a_run(f"runs/{n}", "done") for n in range(40)]
    found[30] = a_run("runs/30", "failed", "a long reason " * 20)
    found[35] = a_run("runs/35", "running")
    lines = lines_of(found, height=23)
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "runs/30 " in text
    assert "runs/35 " in text
    assert "and 22 more: 22 done" in text
    assert text.count("a long reason") < 20
    assert "a long reason " * 20 in " ".join(lines_of(found)).replace("  ", " ") + " "


@pytest.mark.slow
def test_watching_on_a_terminal_ends_with_ctrl_c(tmp_path: Path) -> None:
    for number in range(30):
        ended(tmp_path / "runs" / f"run-{number:02d}-of-many")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background are started deaf to it
        hidden = {"COLUMNS", "LINES"}
        environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"TERM": "xterm-256color"}
        argv = [sys.executable, "-m", "dist_vpt", "status", "runs", "--watch", "0.3"]
        os.execve(sys.executable, argv, environment | {"PYTHONPATH": str(Path(__file__).parents[2])})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    written, deadline, asked = b"", time.monotonic() + 60, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                written += os.read(terminal, 65536)
            except OSError:  # it has ended
                break
        if written.count(b"Ctrl-C ends") >= 3 and not asked:
            os.write(terminal, b"\x03")
            asked = True
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    text = written.decode()
    assert "Traceback" not in text
    assert (text.count("\x1b[?1049h"), text.count("\x1b[?1049l")) == (1, 1), "one change of screen, and back"
    frames, after = text.split("\x1b[?1049l")  # the newest one may be cut off
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frames.split("\x1b[H")[2]).replace("\r", "").splitlines()
    assert len(drawn) <= 24
    assert max(map(len, drawn)) <= 80
    assert any(re.match(r"and \d+ more: \d+ done", line) for line in drawn), "\n".join(drawn)
    assert "run-29-of-many" in after, "all of them, on the screen that stays"

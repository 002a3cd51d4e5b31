"""Waiting for servers: several requests at a time, and the end of it by a stop signal."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dist_vpt.data import waiting
from dist_vpt.data.waiting import answer_to, in_parallel, locked_or_stopped, pause, raise_on_stop, stoppable
from dist_vpt.distributed.signals import StopSignal, follow_stop_flag, share_stop_flag, stop_requested
from dist_vpt.errors import DataError, Interrupted
from dist_vpt.files import locked

FOREVER = 600.0


@pytest.fixture
def stop_soon() -> Iterator[Callable[[], None]]:
    """Sends SIGTERM to this process after a while."""
    timers = []

    def send() -> None:
        timers.append(threading.Timer(0.2, signal.raise_signal, (signal.SIGTERM,)))
        timers[-1].start()

    yield send
    for timer in timers:
        timer.join()


def held(file: Path) -> None:
    """A lock of another thread, for ever."""

    def hold() -> None:
        with locked(file, "", timeout=-1):
            time.sleep(FOREVER)

    threading.Thread(target=hold, daemon=True).start()
    while not file.exists():
        time.sleep(0.01)


WAITS: list[Callable[[Path], object]] = [
    lambda folder: in_parallel(time.sleep, [FOREVER] * 3, what="the shards"),
    lambda folder: answer_to(lambda: time.sleep(FOREVER), "the shards"),
    lambda folder: pause(FOREVER, "the shards"),
    lambda folder: locked_or_stopped(folder / "lock", "", "the shards").__enter__(),
]


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("context", [StopSignal, stoppable])
def test_a_stop_ends_it(
    context: Callable[[], StopSignal], wait: Callable[[Path], object], tmp_path: Path, stop_soon: Callable[[], None]
) -> None:
    held(tmp_path / "lock")

    def waits() -> None:
        with context():
            stop_soon()
            wait(tmp_path)

    with pytest.raises(Interrupted, match="the shards: stopped while it was waited for") as caught:
        waits()
    assert caught.value.exit_code == 75
    raise_on_stop()  # it is over with the context


def test_nothing_is_asked_after_a_stop() -> None:
    with StopSignal():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            in_parallel(pytest.fail, ["asked"])
    with pytest.raises(Interrupted), stoppable():
        signal.raise_signal(signal.SIGTERM)  # told at the end, where nothing was waited for


def test_waiting_goes_on_where_a_stop_may_not_end_it() -> None:
    with StopSignal() as stop:
        stop.ends_waiting = False
        signal.raise_signal(signal.SIGTERM)
        assert in_parallel(abs, [-1, -2]) == [1, 2]
        stop.ends_waiting = True
        with pytest.raises(Interrupted):
            in_parallel(abs, [-1])


def test_control_c_before_training_does_what_it_did() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stoppable():
        assert signal.getsignal(signal.SIGINT) is before


def test_worker_processes_see_a_stop_in_a_flag() -> None:
    flag = share_stop_flag()
    with StopSignal():
        assert not flag
        signal.raise_signal(signal.SIGTERM)
        assert flag
    assert not flag
    try:
        follow_stop_flag(flag.clone().fill_(1))  # as a worker has it of its training process
        assert stop_requested()
    finally:
        follow_stop_flag(None)


def test_a_stop_while_torch_traces_is_no_part_of_what_it_traces() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return x + 1

    flag = share_stop_flag()
    with StopSignal():
        traced = make_fx(program)(torch.zeros(2))
        assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_function", "output"]
        assert flag
    with FakeTensorMode(), StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_many_files_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waiting, "REPORT_SECONDS", 0.05)
    assert in_parallel(lambda i: time.sleep(i / 100) or -i, range(20), "reading files") == [-i for i in range(20)]
    assert "reading files: " in capsys.readouterr().err
    with pytest.raises(DataError, match="the third"):
        in_parallel(_third, range(8))
    assert capsys.readouterr().err == ""


def test_an_interruption_waits_for_no_server() -> None:
    """Ctrl-C while files are indexed, and the end of the program after it, though requests get no answer."""
    program = (
        "import signal, threading, time\n"
        "from dist_vpt.data.waiting import in_parallel\n"
        "threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,)).start()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "in_parallel(time.sleep, [600] * 3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in ended.stderr


def _third(i: int) -> int:
    if i == 2:
        raise DataError("the third")
    return i

"""The signals that ask for a stop, and processes that must not get them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, ClassVar

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import Interrupted

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal sends Ctrl-C to all processes of a command, and a launcher among them sends it on: that is one Ctrl-C.
SAME_SECONDS = 1.0
NOTICE = b"\nstopping, and saving the state first; press Ctrl-C again to end at once\n"

_shared: "Tensor | None" = None  # uint8 [1] in shared memory: whether stop_requested
# The same memory. A signal may come while torch traces or compiles, which would record or refuse a write to a tensor.
_flag: "np.ndarray | None" = None


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Processes that are started within never get a signal that asks for a stop.

    A cluster sends it to all processes of a job, and a terminal to all of a command, but loader workers must outlive it
    for the state to be saved. A signal to this process is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_requested() -> bool:
    """Whether to wait no longer for a server, since a stop was asked for; in a worker, of its training process."""
    return any(stop.requested and stop.ends_waiting for stop in StopSignal.entered) or (
        _flag is not None and bool(_flag[0])
    )


def share_stop_flag() -> "Tensor":
    """``stop_requested`` as uint8 [1] in shared memory, for worker processes: they get no signals."""
    global _shared, _flag  # noqa: PLW0603 (signals are the program's, too)
    if _shared is None or _flag is None:
        import torch

        _shared = torch.zeros(1, dtype=torch.uint8).share_memory_()
        _flag = _shared.numpy()
    _flag[0] = stop_requested()
    return _shared


def follow_stop_flag(flag: "Tensor | None") -> None:
    """In a worker process: have ``stop_requested`` tell what the training process shares."""
    global _flag  # noqa: PLW0603
    _flag = None if flag is None else flag.numpy()


class StopSignal:
    """Records SIGTERM, SIGUSR1 and SIGINT (Ctrl-C), which ask for a stop once all processes have agreed on it.

    A second Ctrl-C raises KeyboardInterrupt, a third one ends the process. Of nested ones, the inner one takes over a
    request that the outer one got, and the other way round at its end. Threads get no signals: entered in one other
    than the main thread, it never asks for a stop.
    """

    entered: ClassVar[list["StopSignal"]] = []

    def __init__(self, *, keyboard: bool = True) -> None:
        """``keyboard``: whether Ctrl-C asks for a stop, too; else it does what it does outside."""
        self._numbers = STOP if keyboard else tuple(number for number in STOP if number != signal.SIGINT)
        self.ends_waiting = True  # whether a request ends the waiting for a server at once
        self.requested = False  # this process got a signal
        self.agreed = False  # all processes are to stop
        self.pressed: float | None = None  # when Ctrl-C was first pressed, by the monotonic clock

    def __enter__(self) -> "StopSignal":
        self.previous: dict[int, object] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        with block_stop_signals():
            resource_tracker.ensure_running()  # now: any package might start it later, without blocked signals
        outer = self.entered[-1] if self.entered else None
        if outer is not None:
            self.requested, self.pressed = outer.requested, outer.pressed
        self.entered.append(self)
        for number in self._numbers:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # a job in the background
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in self.entered:
            self.entered.remove(self)
            if not self.entered and _flag is not None:
                _flag[0] = 0
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.entered and self.previous:
            outer = self.entered[-1]
            outer.requested, outer.pressed = outer.requested or self.requested, outer.pressed or self.pressed
        if isinstance(error, Interrupted) and self.pressed is not None:
            error.exit_code = Interrupted.BY_KEYBOARD

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if _flag is not None:
            _flag[0] = stop_requested()
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self.pressed is None:
            self.pressed = now
            if LaunchEnv.current().rank == 0:
                os.write(2, NOTICE)  # print could be in the middle of a line, and is not to be entered again
        elif now - self.pressed >= SAME_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # for a third one, where this one waits in vain
            raise KeyboardInterrupt

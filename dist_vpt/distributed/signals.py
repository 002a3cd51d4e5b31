"""The signals that ask for a stop, and processes that are not to hear them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import ClassVar

STOP = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Processes that are started within never get a signal that asks for a stop.

    A cluster sends it to all processes of a job: who loads images must outlive it, for the state to be saved. What
    reaches this process meanwhile is kept until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignal:
    """SIGTERM and SIGUSR1 ask for a stop; it is made where all processes have agreed on it.

    One that is entered within another learns of what the outer one was asked, and hands on what it was asked itself.
    """

    entered: ClassVar[list["StopSignal"]] = []

    def __init__(self) -> None:
        self.asked = False  # of this process
        self.agreed = False  # by all of them

    def __enter__(self) -> "StopSignal":
        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        with block_stop_signals():
            resource_tracker.ensure_running()  # now: it would be started by any package, later
        self.previous = {s: signal.signal(s, ask) for s in STOP}
        self.asked |= any(outer.asked for outer in self.entered)
        self.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.entered.remove(self)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.asked and self.entered:
            self.entered[-1].asked = True

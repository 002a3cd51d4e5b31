"""The signals that ask for a stop, and processes that must not get them."""

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

    A cluster sends it to all processes of a job, but loader workers must outlive it for the state to be saved. A signal
    to this process is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopSignal:
    """Records SIGTERM and SIGUSR1, which ask for a stop; the run stops once all processes have agreed on it.

    Of nested ones, the inner one takes over a request that the outer one got, and the other way round at its end.
    """

    entered: ClassVar[list["StopSignal"]] = []

    def __init__(self) -> None:
        self.requested = False  # this process got a signal
        self.agreed = False  # all processes are to stop

    def __enter__(self) -> "StopSignal":
        def ask(number: int, frame: FrameType | None) -> None:
            self.requested = True

        with block_stop_signals():
            resource_tracker.ensure_running()  # now: any package might start it later, without blocked signals
        self.previous = {number: signal.signal(number, ask) for number in STOP}
        self.requested |= any(outer.requested for outer in self.entered)
        self.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.entered.remove(self)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.requested and self.entered:
            self.entered[-1].requested = True

"""The signals that ask for a stop, and processes that are not to hear them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def unheard() -> Iterator[None]:
    """Processes that are started within never get a signal that asks for a stop.

    A cluster sends it to all processes of a job: who loads images must outlive it, for the state to be saved. What
    reaches this process meanwhile is kept until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Waiting for servers, which a stop signal ends: for several requests at a time, and before one is tried again."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal, stop_requested
from dist_vpt.errors import Interrupted
from dist_vpt.files import locked

READERS = 16  # requests of one process at a time while files are indexed
REPORT_SECONDS = 30.0
LOOK_SECONDS = 0.25  # between two looks at whether a stop was asked for
DATA = "streamed data"

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    doing: str = "",
    what: str = DATA,
    readers: int = READERS,
) -> list[Result]:
    """The function's results for all items, in their order; the first error ends it.

    ``doing``: what takes long, for a line on stderr every half minute. ``what``: as of ``raise_on_stop``.
    """
    raise_on_stop(what)
    left = deque(enumerate(items))
    count, results, errors = len(left), dict[int, Result](), list[BaseException]()

    def answer() -> None:
        while not errors:
            try:
                number, item = left.popleft()
            except IndexError:
                return
            try:
                results[number] = function(item)
            except BaseException as error:  # raised by whoever waits
                errors.append(error)

    # Daemons: a stop waits for no server that is silent.
    threads = [threading.Thread(target=answer, daemon=True) for _ in range(min(readers, count))]
    reported = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(min(LOOK_SECONDS, REPORT_SECONDS))
                if thread.is_alive():
                    raise_on_stop(what)
                if doing and time.monotonic() >= reported + REPORT_SECONDS and not LaunchEnv.current().local_rank:
                    print(f"{doing}: {len(results)} of {count}", file=sys.stderr, flush=True)
                    reported = time.monotonic()
        if errors:
            raise errors[0]
        return [results[number] for number in range(count)]
    finally:
        left.clear()


def answer_to(ask: Callable[[], Result], what: str = DATA) -> Result:
    """What ``ask`` returns or raises. Raises Interrupted, as ``raise_on_stop``, within a second of a stop signal."""
    return in_parallel(lambda _: ask(), [None], what=what)[0]


def pause(seconds: float, what: str) -> None:
    """Sleep, unless a stop is asked for."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        raise_on_stop(what)
        time.sleep(min(LOOK_SECONDS, left))


def raise_on_stop(what: str = DATA) -> None:
    """Raise Interrupted where a stop was asked for; ``what``: was waited for."""
    if stop_requested():
        raise _stopped(what)


@contextmanager
def locked_or_stopped(file: Path, fix: str, what: str = DATA) -> Iterator[None]:
    """Hold a lock whose holder may wait for a server; ``fix``: as of ``locked``. Raises Interrupted as above."""
    with locked(file, fix, timeout=-1, cancel=stop_requested) as acquired:
        if not acquired:
            raise _stopped(what)
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGUSR1 within raise Interrupted where servers are waited for.

    Before training they would kill the process: so they end a long index with the exit code of any stopped run.
    """
    with StopSignal(keyboard=False):
        yield
        raise_on_stop()


def _stopped(what: str) -> Interrupted:
    return Interrupted(
        f"{what}: stopped while it was waited for; start again, a run that has a state with run.resume=auto"
    )

"""Pieces are fetched in the order in which batches need them, a few before they are needed."""

import threading
import time

import numpy as np

from dist_vpt.data.pieces import AHEAD, Pieces
from dist_vpt.data.read_ahead import ReadAhead, reading_ahead
from tests.running import wait_for

COUNT = 20


def pieces(fetched: list[int], fails: bool = False) -> Pieces:
    lock = threading.Lock()

    def fetch(piece: int) -> None:
        with lock:
            fetched.append(piece)
        if fails:
            raise OSError("the server is gone")

    return Pieces(np.repeat(np.arange(COUNT, dtype=np.int32), 2), np.ones(COUNT), 4, fetch)


def requests() -> list[np.ndarray]:
    """The last piece first, and padding."""
    return [np.array([2 * piece, -1, 2 * piece + 1]) for piece in reversed(range(COUNT))]


def test_as_many_as_may_be_and_no_more() -> None:
    fetched: list[int] = []
    ahead = ReadAhead(pieces(fetched), requests())
    for reached in (0, 3, COUNT - 1):
        ahead.advance(reached)
        wanted = min(reached + 1 + AHEAD, COUNT)
        wait_for(lambda wanted=wanted: len(fetched) >= wanted, 10)
        time.sleep(0.05)
        assert sorted(fetched) == sorted(range(COUNT))[COUNT - wanted :]
    ahead.close()


def test_an_end_and_failures_are_quiet() -> None:
    fetched: list[int] = []
    with reading_ahead(pieces(fetched, fails=True), requests()) as ahead:
        assert ahead is not None
        wait_for(lambda: len(fetched) == 1 + AHEAD, 10)
    wait_for(lambda: not any(thread.name.endswith("(_run)") for thread in threading.enumerate()), 10)
    assert len(fetched) == 1 + AHEAD
    with reading_ahead(None, requests()) as nothing:
        assert nothing is None
    with reading_ahead(pieces(fetched), []) as nothing:
        assert nothing is None

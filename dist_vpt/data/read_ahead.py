"""Fetches the pieces of streamed data that are needed next, while batches of the pieces before are made."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from dist_vpt.data.pieces import AHEAD, Pieces

THREADS = 4  # requests at a time


class ReadAhead:
    """Threads that fetch the pieces of some requests in the order in which these come to them."""

    def __init__(self, pieces: Pieces, requests: Sequence[np.ndarray]):
        """``requests``: the rows of each one, -1 for none."""
        row_m, request_m = np.concatenate(requests), np.repeat(np.arange(len(requests)), list(map(len, requests)))
        row_m, request_m = row_m[row_m >= 0], request_m[row_m >= 0]
        _, first = np.unique(pieces.piece_n[row_m], return_index=True)
        first.sort()
        self._pieces = pieces
        self._order, self._needed_at = pieces.piece_n[row_m[first]], request_m[first]
        self._reached, self._next, self._closed = 0, 0, False
        self._changed = threading.Condition()
        for _ in range(THREADS):  # daemons: an end of the process does not wait for a request
            threading.Thread(target=self._run, daemon=True).start()

    def advance(self, request: int) -> None:
        """Batches up to this request are made."""
        with self._changed:
            self._reached = request
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _limit(self) -> int:
        """How many pieces may have been fetched by now."""
        return min(int(np.searchsorted(self._needed_at, self._reached, side="right")) + AHEAD, len(self._order))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next < self._limit())
                if self._closed:
                    return
                piece, self._next = int(self._order[self._next]), self._next + 1
            with contextlib.suppress(Exception):  # raised where the piece is read
                self._pieces.fetch(piece)


@contextlib.contextmanager
def reading_ahead(pieces: Pieces | None, requests: Sequence[np.ndarray]) -> Iterator[ReadAhead | None]:
    """Reads ahead within; nothing where records are not in pieces."""
    ahead = ReadAhead(pieces, requests) if pieces is not None and len(requests) else None
    try:
        yield ahead
    finally:
        if ahead is not None:
            ahead.close()

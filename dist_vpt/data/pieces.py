"""Records that are fetched together, a piece at a time, and the order in which an epoch comes to them.

n records of the split, m records drawn in an epoch, G pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

GIB = 2**30
AHEAD = 6  # pieces, at most, that are fetched before they are needed


@dataclass(frozen=True, eq=False)
class Pieces:
    """Which piece each record of a split is in."""

    piece_n: np.ndarray  # int32
    bytes_G: np.ndarray  # int64
    window: int  # records that are shuffled with each other
    fetch: Callable[[int], None]  # a piece, where it is not there

    def subset(self, rows: np.ndarray) -> "Pieces":
        return replace(self, piece_n=self.piece_n[rows])

    def join(self, other: "Pieces") -> "Pieces":
        """The records of these pieces, then those of the others."""
        count = len(self.bytes_G)

        def fetch(piece: int) -> None:
            (self.fetch if piece < count else other.fetch)(piece if piece < count else piece - count)

        return Pieces(
            np.concatenate([self.piece_n, other.piece_n + np.int32(count)]),
            np.concatenate([self.bytes_G, other.bytes_G]),
            self.window,
            fetch,
        )

    @property
    def total(self) -> int:
        """The bytes of all pieces in which there is a record."""
        return int(self.bytes_G[np.unique(self.piece_n)].sum())

    @property
    def at_once(self) -> int:
        """The bytes of the pieces that an epoch needs at a time, about: a window of them, and those fetched ahead."""
        found_G = self.bytes_G[np.unique(self.piece_n)]
        window = self.window * found_G.sum() / max(len(self.piece_n), 1)
        return int(min(found_G.sum(), window + (AHEAD + 2) * found_G.max(initial=0)))


def pieces_of(source: Any) -> Pieces | None:
    """The pieces of a source; None where each record is read on its own."""
    found: Pieces | None = getattr(source, "pieces", None)
    return found


def in_windows(pieces: Pieces, rows_m: np.ndarray, *key: int) -> np.ndarray:
    """The rows in an order that comes to one piece after another, int64 [m]; ``key``: as of ``shuffled``.

    Pieces come in a random order. With position p of a record in it and a window of w records, records are sorted by
    p + w u, with u uniform on [0, 1): so a record is mixed with those of about w positions around it, each piece is
    needed for a while alone, and the pieces of an epoch are needed evenly over it. n <= w records come in any order.
    """
    count = len(pieces.bytes_G)
    random = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count + len(rows_m))
    rank_G = np.empty(count, np.int64)
    rank_G[np.argsort(random[:count], kind="stable")] = np.arange(count)
    position_n = np.empty(len(pieces.piece_n), np.int64)
    position_n[np.argsort(rank_G[pieces.piece_n], kind="stable")] = np.arange(len(pieces.piece_n))
    uniform_m = (random[count:] >> np.uint64(11)) * 2.0**-53
    if len(pieces.piece_n) <= pieces.window:
        return rows_m[np.argsort(uniform_m, kind="stable")]
    return rows_m[np.argsort(position_n[rows_m] + pieces.window * uniform_m, kind="stable")]


def spread_rows(split: Any, count: int) -> np.ndarray:
    """Up to ``count`` rows of a split, evenly spread over it and sorted; of pieces, over as many as 8 of them."""
    pieces = pieces_of(split.source)
    rows = np.arange(len(split))
    if pieces is not None:
        there = np.unique(pieces.piece_n)
        chosen = there[np.unique(np.linspace(0, len(there) - 1, min(len(there), 8)).astype(np.int64))]
        rows = np.flatnonzero(np.isin(pieces.piece_n, chosen))
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64))]

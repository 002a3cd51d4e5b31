"""The order of streamed records: a permutation that needs few pieces at a time, a function of seed and epoch."""

import numpy as np
import pytest

from dist_vpt.data.pieces import Pieces, in_windows, spread_rows
from dist_vpt.data.sampling import epoch_order
from dist_vpt.data.splits import Split, join

PIECES, ROWS, WINDOW = 60, 25, 200
N = PIECES * ROWS


def pieces(window: int = WINDOW) -> Pieces:
    return Pieces(np.repeat(np.arange(PIECES, dtype=np.int32), ROWS), np.full(PIECES, 10), window, lambda _: None)


class Source:
    """A source of nothing but pieces."""

    def __init__(self, of: Pieces):
        self.pieces = of


def split(of: Pieces | None = None) -> Split:
    return Split("train", np.arange(N) % 3, Source(of or pieces()))  # type: ignore[arg-type]


def test_an_epoch_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [epoch_order("shuffle", split(), *key) for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert not any(np.array_equal(one, other) for one, other in zip(orders, orders[1:] + orders[:1], strict=True))
    assert np.array_equal(epoch_order("shuffle", split(), 0, 1), orders[1])


def test_few_pieces_are_needed_at_a_time() -> None:
    """Those of a window, and of the piece that is entered: never more than window / rows + 2."""
    order = in_windows(pieces(), np.arange(N), 3)
    piece_n = order // ROWS
    first = {piece: int(np.flatnonzero(piece_n == piece)[0]) for piece in range(PIECES)}
    last = {piece: int(np.flatnonzero(piece_n == piece)[-1]) for piece in range(PIECES)}
    needed = [sum(first[p] <= t <= last[p] for p in range(PIECES)) for t in range(N)]
    assert max(needed) <= WINDOW / ROWS + 4  # a window's, on average, and chance
    starts = np.sort(list(first.values()))
    assert np.diff(starts).max() < 4 * ROWS  # pieces are entered evenly over the epoch


def test_neighbours_are_mixed() -> None:
    """A record is shown about half a window after its place on average, with the deviation of a uniform draw."""
    order = in_windows(pieces(), np.arange(N), 4)
    mixed = np.mean(order[1:] // ROWS == order[:-1] // ROWS)
    assert mixed < 3 * ROWS / WINDOW  # chance: ROWS / WINDOW


def test_a_window_of_all_records_gives_any_order() -> None:
    places = np.array([in_windows(pieces(N), np.arange(N), seed)[:50] for seed in range(200)])
    assert abs(places.mean() - (N - 1) / 2) < 5 * N / np.sqrt(12 * places.size)
    assert np.histogram(places, 10, (0, N))[0].min() > 0.85 * places.size / 10


def test_balanced_draws_stay_balanced() -> None:
    labels = np.array([0] * (N - 30) + [1] * 30)
    of = Split("train", labels, Source(pieces()))  # type: ignore[arg-type]
    order = epoch_order("balanced", of, 0, 0)
    assert len(order) == N
    assert abs(np.mean(labels[order]) - 0.5) < 0.06
    visits = np.count_nonzero(np.diff(order // ROWS)) + 1
    assert visits > PIECES  # mixed with others
    first, last = (np.flatnonzero(np.isin(order // ROWS, [5]))[k] for k in (0, -1))
    assert last - first < 2 * WINDOW + 100


def test_parts_of_splits_have_the_pieces_of_their_rows() -> None:
    fetched: list[int] = []
    one = Pieces(np.array([0, 0, 1, 1], np.int32), np.array([4, 6]), 2, fetched.append)
    other = Pieces(np.array([0, 1, 1], np.int32), np.array([5, 7]), 2, lambda piece: fetched.append(100 + piece))
    first, second = (Split("x", np.zeros(len(of.piece_n), int), Source(of)) for of in (one, other))  # type: ignore[arg-type]
    joined = join("both", first.subset("first", np.array([3, 0])), second).source.pieces  # type: ignore[attr-defined]
    assert joined.piece_n.tolist() == [1, 0, 2, 3, 3]
    assert joined.total == 22
    for piece in (1, 3):
        joined.fetch(piece)
    assert fetched == [1, 101]


@pytest.mark.parametrize("count", [16, 256, 10_000])
def test_spread_rows_touch_few_pieces(count: int) -> None:
    rows = spread_rows(split(), count)
    assert len(rows) == min(count, 8 * ROWS)
    assert len({row // ROWS for row in rows}) == 8
    assert rows[0] == 0
    assert rows[-1] == N - 1

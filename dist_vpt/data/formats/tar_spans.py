"""Shards behind addresses: which there are, and their samples in spans of bytes that are fetched together.

n samples of a split, G spans.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from dist_vpt.data.addresses import (
    RangeReader,
    RemoteFile,
    check_unchanged,
    expand,
    find_file,
    is_address,
    list_files,
    pinned,
    read_range,
    shown,
)
from dist_vpt.data.config import DataConfig
from dist_vpt.data.pieces import Pieces
from dist_vpt.data.spool import Spool
from dist_vpt.data.waiting import in_parallel
from dist_vpt.errors import DataError

SPAN = 32 * 2**20  # bytes of a shard that are fetched together, about
LISTED = ("*.tar", "*/*.tar")  # the shards below a root


@dataclass(frozen=True, eq=False)
class TarSpans:
    """Spans of some shards. A piece is the bytes of a span."""

    shards: tuple[RemoteFile, ...]
    span_n: np.ndarray  # int32: in which span the image is
    shard_G: np.ndarray  # int32
    start_G: np.ndarray  # int64: its first byte in the shard
    end_G: np.ndarray  # int64
    window: int
    spool: Spool

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.span_n, self.end_G - self.start_G, self.window, lambda span: self._open(span).close())

    def read(self, i: int, offset: int, size: int) -> bytes:
        """The image of sample i, at its place in the shard."""
        span = int(self.span_n[i])
        with self._open(span) as opened:
            opened.seek(offset - int(self.start_G[span]))
            return opened.read(size)

    def _open(self, span: int) -> BinaryIO:
        file, start, end = self.shards[self.shard_G[span]], int(self.start_G[span]), int(self.end_G[span])

        def write(sink: BinaryIO) -> None:
            check_unchanged(file)
            sink.write(read_range(file, start, end))

        return self.spool.open(_piece_name(file, start, end), end - start, write)


class SpanReader(RangeReader):
    """A shard that is read forward for its index; the spans that it comes past are kept in the spool.

    Bytes from the beginning of the span on are held until its end is known. Members that are skipped over, since they
    are larger than a block, are not fetched: a span with such a one is left to be fetched when it is needed.
    """

    def __init__(self, file: RemoteFile, spool: Spool):
        super().__init__(file, SPAN // 4)
        self._spool, self._start, self._end = spool, 0, 0

    def add(self, offset: int, size: int) -> None:
        """The next image, which has been passed."""
        if offset // SPAN != self._start // SPAN or not self._end:
            self.keep()
            self._start = offset
        self._end = offset + size

    def keep(self) -> None:
        """Keep the span that ends with the last image."""
        begin, size = self._start - self._first, self._end - self._start
        if begin < 0 or not 0 < size <= len(self._kept) - begin:
            return

        def write(sink: BinaryIO) -> None:
            check_unchanged(self._file)
            sink.write(self._kept[begin : begin + size])

        self._spool.open(_piece_name(self._file, self._start, self._end), size, write).close()

    def _fetch(self, wanted: int) -> None:
        last = self._first + len(self._kept)
        if not last <= self._at <= last + self._block or last - self._start > 2 * SPAN:
            super()._fetch(wanted)
            return
        del self._kept[: max(self._start - self._first, 0)]
        self._first = last - len(self._kept)
        self._kept += read_range(self._file, last, min(max(last + self._block, self._at + wanted), self._file.size))


def within_budget(files: Iterable[RemoteFile], spool: Spool) -> set[RemoteFile]:
    """The first of the files, as many as the spool has room for."""
    kept, total = set(), 0
    for file in files:
        total += file.size
        if total > spool.budget:
            break
        kept.add(file)
    return kept


def _piece_name(file: RemoteFile, start: int, end: int) -> str:
    return f"tar {file.address} {file.size} {file.version} {start} {end}"


def find_spans(  # noqa: PLR0917
    shards: Sequence[RemoteFile],
    shard_n: np.ndarray,
    offset_n: np.ndarray,
    size_n: np.ndarray,
    window: int,
    spool: Spool,
) -> TarSpans:
    """The spans of samples, which are in the order of their shards; a span starts where the last one has SPAN bytes."""
    block_n = offset_n // SPAN
    new_n = np.ones(len(offset_n), bool)
    new_n[1:] = (shard_n[1:] != shard_n[:-1]) | (block_n[1:] != block_n[:-1])
    first_G = np.flatnonzero(new_n)
    last_G = np.append(first_G[1:], len(offset_n)) - 1
    return TarSpans(
        tuple(shards),
        (np.cumsum(new_n) - 1).astype(np.int32),
        shard_n[first_G].astype(np.int32),
        offset_n[first_G],
        offset_n[last_G] + size_n[last_G],
        window,
        spool,
    )


def check_addresses(recipe: DataConfig) -> None:
    """Raises the DataErrors of addresses that need no look at the server."""
    patterns = recipe.webdataset.splits
    if not patterns and recipe.root is not None and recipe.root.startswith(("http://", "https://")):
        raise DataError(
            f"data.root {shown(recipe.root)!r}: does not list its files; name the shards of each split: "
            "'data.webdataset.splits={train: \"train-{0000..0009}.tar\", val: ...}'"
        )
    if patterns and "train" not in patterns:
        raise DataError("data.webdataset.splits: has no train; name its shards: {train: 'train-*.tar'}")
    for name, pattern in patterns.items():
        if is_address(pattern) or pattern.startswith(("/", "~")):
            raise DataError(
                f"data.webdataset.splits.{name} {pattern!r}: must be a pattern of files below data.root, such as "
                "train-{0000..0009}.tar"
            )


def find_addresses(recipe: DataConfig) -> dict[str, list[str]]:
    """The addresses of the shards that the recipe names for each split, or under "" all that the server lists."""
    assert recipe.root is not None  # DataConfig requires it
    check_addresses(recipe)
    if recipe.webdataset.splits:
        return {
            str(name): expand(f"data.webdataset.splits.{name}", recipe.root, pattern)
            for name, pattern in recipe.webdataset.splits.items()
        }
    root = pinned(recipe.root).rstrip("/")
    found = [each for pattern in LISTED for each in list_files(f"{root}/{pattern}")]
    if not found:
        raise DataError(
            f"data.root {shown(root)!r}: has no .tar in it or in its folders; give the folder of the shards"
        )
    return {"": sorted(found)}


def find_files(addresses: dict[str, list[str]]) -> dict[str, list[RemoteFile]]:
    """The files behind the addresses of each split."""
    return {name: in_parallel(find_file, some) for name, some in addresses.items()}

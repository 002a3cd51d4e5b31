"""Parquet files that are trained on in place: their labels are read once, their images a row group at a time.

n records of a split, G row groups.
"""

import io
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from dist_vpt.data.addresses import RangeReader, RemoteFile, check_unchanged, find_file, read_range
from dist_vpt.data.images import AS_PUBLISHED, Decoding, decode
from dist_vpt.data.pieces import Pieces
from dist_vpt.data.spool import Spool, cache_subfolder, keep
from dist_vpt.data.waiting import in_parallel
from dist_vpt.errors import DataError
from dist_vpt.files import looks_like

LAYOUT = 1  # of index files
TAIL = 64 * 2**10  # bytes at the end of a file that are read first: most footers are shorter
RECORD = 64  # bytes that a record takes in a piece besides its image, at most


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """The images of some Parquet files. A piece is the image column of one row group, as Arrow's IPC file."""

    files: tuple[RemoteFile, ...]
    footers: tuple[Path, ...]  # kept copies of those of the files
    column: str
    file_G: np.ndarray  # int32: which of the files
    group_G: np.ndarray  # int32: which of its row groups
    first_G: np.ndarray  # int64: its first record in the split
    row_G: np.ndarray  # int64: its first record in the file
    rows_G: np.ndarray  # int64: how many it has
    bytes_G: np.ndarray  # int64: of its images, decompressed
    window: int
    spool: Spool
    decoding: Decoding = AS_PUBLISHED

    def read(self, i: int, max_megapixels: float) -> Image.Image:
        stored = self._stored(i)
        encoded = stored.get("bytes") if isinstance(stored, dict) else stored
        if encoded is None:
            path = stored.get("path") if isinstance(stored, dict) else None
            what = (
                f"holds the path {path!r} in place of an image, and paths are not followed" if path else "has no image"
            )
            raise DataError(f"{self.where(i)}: {what}; remove the record, or set data.on_decode_error=skip")
        return decode(encoded, self.where(i), max_megapixels, self.decoding)

    def where(self, i: int) -> str:
        piece = self._piece(i)
        return f"{self.files[self.file_G[piece]]} record {i - self.first_G[piece] + self.row_G[piece]}"

    def identity(self, i: int) -> str:
        piece = self._piece(i)
        file = self.files[self.file_G[piece]]
        row = i - self.first_G[piece] + self.row_G[piece]
        return f"{_key(file)} {row} {self.column} {self.decoding}"

    @property
    def pieces(self) -> Pieces:
        piece_n = np.repeat(np.arange(len(self.rows_G), dtype=np.int32), self.rows_G)
        return Pieces(piece_n, self.bytes_G, self.window, lambda piece: self._open(piece).close())

    def _piece(self, i: int) -> int:
        return int(np.searchsorted(self.first_G, i, side="right")) - 1

    def _stored(self, i: int) -> Any:
        import pyarrow as pa

        piece = self._piece(i)
        with self._open(piece) as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
            stored = table.column(0)[i - int(self.first_G[piece])].as_py()
            del table  # or the map could not be closed
            return stored

    def _open(self, piece: int) -> BinaryIO:
        file, number = self.files[self.file_G[piece]], int(self.group_G[piece])
        footer = self.footers[self.file_G[piece]]
        name = f"parquet {LAYOUT} {_key(file)} {number} {self.column}"

        def write(sink: BinaryIO) -> None:
            check_unchanged(file)
            fetch_group(file, footer, number, self.column, sink)

        return self.spool.open(name, int(self.bytes_G[piece] + RECORD * self.rows_G[piece]), write)


class ParquetPart:
    """A split of a dataset: its features, the labels, and the source of its images."""

    def __init__(self, location: str, addresses: Sequence[str], features: Any):
        """``features``: datasets.Features, or None for those that the first file declares."""
        self.location, self.addresses, self._features = location, tuple(addresses), features

    @cached_property
    def files(self) -> tuple[RemoteFile, ...]:
        return tuple(in_parallel(find_file, self.addresses))

    @cached_property
    def features(self) -> Any:
        if self._features:
            return self._features
        import datasets

        footer = read_footer(keep_footer(self.files[0], cache_subfolder("parquet")))
        return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())

    def __getitem__(self, column: str) -> list[Any]:
        """The values of a column of labels."""
        import pyarrow as pa

        values: list[Any] = []
        folder = cache_subfolder("parquet")
        for kept in in_parallel(
            lambda file: keep_column(file, column, folder), self.files, f"{self.location}: reading labels of files"
        ):
            with pa.memory_map(str(kept)) as mapped:
                values += pa.ipc.open_file(mapped).read_all().column(0).to_pylist()
        return values

    def source(self, image: str, window: int, spool: Spool, decoding: Decoding) -> ParquetSource:
        """The images of a column."""
        folder = cache_subfolder("parquet")
        kept = in_parallel(lambda file: keep_footer(file, folder), self.files)
        footers = [read_footer(footer) for footer in kept]
        for file, footer in zip(self.files, footers, strict=True):
            _check_column(file, footer, image)
        groups = [(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        rows_G = np.array([footers[f].row_group(g).num_rows for f, g in groups], np.int64)
        bytes_G = np.array([group_bytes(footers[f].row_group(g), image) for f, g in groups], np.int64)
        file_G, group_G = np.array(groups, np.int32).reshape(-1, 2).T
        first_G = np.cumsum(rows_G) - rows_G
        row_G = first_G - first_G[np.searchsorted(file_G, file_G)]
        kept_G = rows_G > 0
        return ParquetSource(
            files=self.files,
            footers=tuple(kept),
            column=image,
            file_G=file_G[kept_G],
            group_G=group_G[kept_G],
            first_G=first_G[kept_G],
            row_G=row_G[kept_G],
            rows_G=rows_G[kept_G],
            bytes_G=bytes_G[kept_G],
            window=window,
            spool=spool,
            decoding=decoding,
        )


def keep_footer(file: RemoteFile, folder: Path) -> Path:
    """A copy of a file's footer, in a file of its own."""

    def content() -> bytes:
        kept = io.BytesIO()
        _footer_of(file).write_metadata_file(kept)
        return kept.getvalue()

    return keep(folder, f"footer {LAYOUT} {_key(file)}", content)


def keep_column(file: RemoteFile, column: str, folder: Path) -> Path:
    """A copy of a column, as Arrow's IPC file. Of the file, the footer and this column alone are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def content() -> bytes:
        footer = read_footer(keep_footer(file, folder))
        _check_column(file, footer, column)
        reader = pa.PythonFile(RangeReader(file, block=0), mode="r")
        try:
            table = pq.ParquetFile(reader, metadata=footer).read([column])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: {_damage(error)}") from None
        check_unchanged(file)
        kept = io.BytesIO()
        with pa.ipc.new_file(kept, table.schema.remove_metadata()) as sink:
            sink.write_table(table.replace_schema_metadata())
        return kept.getvalue()

    return keep(folder, f"column {LAYOUT} {column} {_key(file)}", content)


@lru_cache(maxsize=64)
def read_footer(kept: Path) -> Any:
    """pyarrow's FileMetaData of a kept footer."""
    import pyarrow.parquet as pq

    return pq.read_metadata(kept)


def group_bytes(group: Any, column: str) -> int:
    """The bytes of a column in a row group, decompressed."""
    return sum(chunk.total_uncompressed_size for chunk in _chunks(group, column))


def fetch_group(file: RemoteFile, kept: Path, number: int, column: str, sink: BinaryIO) -> None:
    """Write a column of a row group, fetched by one request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    footer = read_footer(kept)
    chunks = _chunks(footer.row_group(number), column)
    starts = [min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))) for chunk in chunks]
    ends = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)]
    part = RangeReader(file, block=0, kept=read_range(file, min(starts), max(ends)), first=min(starts))
    try:
        table = pq.ParquetFile(pa.PythonFile(part, mode="r"), metadata=footer).read_row_group(number, [column])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} row group {number}: {_damage(error)}") from None
    with pa.ipc.new_file(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata())


def _key(file: RemoteFile) -> str:
    return f"{file.address} {file.size} {file.version}"


def _check_column(file: RemoteFile, footer: Any, column: str) -> None:
    if column not in footer.schema.to_arrow_schema().names:
        raise DataError(f"{file}: has no column {column!r}; write all files of a split with the same columns")


def _chunks(group: Any, column: str) -> list[Any]:
    chunks = (group.column(number) for number in range(group.num_columns))
    return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]


def _footer_of(file: RemoteFile) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tail = min(TAIL, file.size)
    ending = read_range(file, file.size - tail, file.size)
    if not ending.endswith(b"PAR1"):
        head = looks_like(read_range(file, 0, min(256, file.size)))
        raise DataError(f"{file}: {head or 'is no whole Parquet file; upload or copy it again'}")
    length = int.from_bytes(ending[-8:-4], "little") + 8
    if length > tail:
        ending = read_range(file, file.size - min(length, file.size), file.size)
    try:
        part = RangeReader(file, block=0, kept=ending, first=file.size - len(ending))
        return pq.read_metadata(pa.PythonFile(part, mode="r"))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: {_damage(error)}") from None


def _damage(error: Exception) -> str:
    return f"is no whole Parquet file ({' '.join(str(error).split())[:200]}); upload or copy it again"

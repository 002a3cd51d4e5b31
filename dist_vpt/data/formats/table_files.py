"""The files of tables: text with delimiters by the standard library, Parquet by pyarrow."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_vpt.data.config_table import TableConfig
from dist_vpt.errors import DataError, UserError
from dist_vpt.files import looks_like, printable

TEXT = (".csv", ".tsv", ".tab", ".txt")
PARQUET = (".parquet", ".pq")
FOUND_IN_FOLDERS = (".csv", ".tsv", *PARQUET)  # a .txt may be anything
DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
HF_HINT = "read it with data.format=hf and data.root=FOLDER"


class Table(Protocol):
    """A table whose header has been read."""

    file: Path
    unit: str  # what rows are counted in
    columns: Sequence[str]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """The number of each row, as ``where`` takes it, and its cells in some columns. Raises DataError."""
        ...

    def where(self, number: int) -> str:
        """A row, for messages."""
        ...


def open_table(file: Path, settings: TableConfig) -> Table:
    """A table by its extension. Raises DataError, and UserError where pyarrow is missing."""
    extension = file.suffix.lower()
    if extension in PARQUET:
        return ParquetTable(file)
    if extension in TEXT:
        return TextTable(file, settings)
    fix = "save it as CSV (UTF-8)" if extension in (".xls", ".xlsx", ".xlsm", ".ods") else "give one of these"
    raise DataError(f"{printable(file)}: is no table that is read ({', '.join((*TEXT, *PARQUET))}); {fix}")


class TextTable:
    """Text with a line of column names, then a line for each image."""

    unit = "line"

    def __init__(self, file: Path, settings: TableConfig):
        self.file = file
        text = _decoded(file, settings.encoding)
        delimiter = DELIMITERS[settings.delimiter] if settings.delimiter else _likely_delimiter(text)
        # Strict, or a quote that is never closed would swallow all lines below it.
        self._reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next((cells for _, cells in self._records()), None)
        if header is None:
            raise DataError(f"{printable(file)}: is empty; add a line of column names, such as image{delimiter}label")
        while len(header) > 1 and not header[-1]:
            header.pop()
        self.columns: Sequence[str] = header

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        chosen = [self.columns.index(name) for name in names]
        width = len(self.columns)
        for line, cells in self._records():
            if len(cells) < width or any(cells[width:]):
                fields = f"{len(cells)} field{'s' if len(cells) > 1 else ''}"
                raise DataError(
                    f"{self.where(line)}: has {fields}, and the line of column names has {width}; put a "
                    "field that holds the delimiter in quotes, or complete the line"
                )
            yield line, [cells[k] for k in chosen]

    def where(self, number: int) -> str:
        return f"{printable(self.file)}:{number}"

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The line at which each record begins, and its fields without blanks around them; empty lines are left out."""
        while True:
            line = self._reader.line_num + 1
            try:
                cells = [cell.strip() for cell in next(self._reader)]
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    f"{self.where(line)}: the line cannot be read ({error}); close the quotes, and double those "
                    "inside of a field"
                ) from None
            if any(cells):
                yield line, cells


class ParquetTable:
    """A Parquet file; rows are counted from 1."""

    unit = "row"

    def __init__(self, file: Path):
        self.file = file
        try:
            import pyarrow.parquet as pq
        except ImportError:
            raise UserError(
                f"{printable(file)}: Parquet needs pyarrow; pip install 'dist-vpt[parquet]', or save the table as CSV"
            ) from None
        try:
            self._opened = pq.ParquetFile(file)
        except Exception as error:  # pyarrow raises errors of several families for damaged files
            raise DataError(f"{printable(file)}: cannot be read ({_brief(error)}); write it again") from None
        self._schema = self._opened.schema_arrow
        self.columns: Sequence[str] = list(self._schema.names)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        import pyarrow as pa

        for name in names:
            kind = self._schema.field(name).type
            if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
                raise DataError(
                    f"{printable(self.file)}: column {name!r} holds encoded images or other structures ({kind}), and a "
                    f"table has paths; {HF_HINT}"
                )
        number = 0
        try:
            for batch in self._opened.iter_batches(columns=list(dict.fromkeys(names))):
                found = {
                    name: column.to_pylist() for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                for cells in zip(*(found[name] for name in names), strict=True):
                    number += 1
                    yield number, [cell.strip() if isinstance(cell, str) else cell for cell in cells]
        except pa.ArrowException as error:
            raise DataError(f"{printable(self.file)}: is damaged ({_brief(error)}); write it again") from None

    def where(self, number: int) -> str:
        return f"{printable(self.file)} row {number}"


def _decoded(file: Path, encoding: str | None) -> str:
    """The text of a file. Raises DataError with the line of the first byte that does not belong to the encoding."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(file)}: cannot be read ({error.strerror}); fix its permissions") from None
    if data[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1"):
        fix = "name it .parquet" if data[:4] == b"PAR1" else "save it as CSV (UTF-8)"
        raise DataError(f"{printable(file)}: is no text but a {'Parquet file' if fix[0] == 'n' else 'workbook'}; {fix}")
    if kind := looks_like(data[:256]):
        raise DataError(f"{printable(file)}: {kind}")
    used = encoding or next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(used)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = data[:start].count(b"\n") + 1
        raise DataError(
            f"{printable(file)}:{line}: byte {start} (0x{data[start]:02x}) is not {used}; save the table as UTF-8, or "
            "set data.table.encoding to what it has, such as cp1252 (Windows) or latin-1"
        ) from None


def _likely_delimiter(text: str) -> str:
    first = re.sub(r'"[^"]*"', "", next((line for line in io.StringIO(text) if line.strip()), ""))
    return max(DELIMITERS.values(), key=first.count)


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

"""Where the samples of a tar file are: found once by reading its headers, and kept in the cache folder.

With it any sample is read on its own, so that shards are shuffled and resumed as exactly as a folder of images. A shard
behind an address is read once for it, from its beginning to its end; what the disk has room for is kept on the way.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_vpt.data.addresses import RangeReader, RemoteFile, check_unchanged
from dist_vpt.data.formats.files import Mistakes
from dist_vpt.data.formats.tar_spans import SpanReader
from dist_vpt.data.images import image_extensions
from dist_vpt.data.spool import Spool, cache_subfolder, keep
from dist_vpt.data.waiting import locked_or_stopped
from dist_vpt.distributed.caches import cache_folder
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import first_bytes, looks_like, printable, write_atomically

LAYOUT = 1  # of index files
MAX_LABEL_BYTES = 2**20
FIRST_BLOCK = 2**16  # bytes of a request while the first sample alone is read
USUAL_FIELDS = ("label", "class", "cls", "category", "target", "class_name", "label_name")
Shard = Path | RemoteFile

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


@dataclass(frozen=True)
class Fields:
    """Which members of a sample are read."""

    image: str | None  # extension; None: the only one of an image
    label: str  # extension, or json.FIELD


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The samples of a shard, n of them."""

    key_n: np.ndarray  # bytes: the name that a sample's members have in common, UTF-8
    offset_n: np.ndarray  # int64: first byte of the image
    size_n: np.ndarray  # int64: bytes of the image
    label_n: np.ndarray  # bytes: what the label says, UTF-8; empty where a sample has none


ARRAYS = ("key_n", "offset_n", "size_n", "label_n")


def read_index(shard: Shard, fields: Fields, spool: Spool | None = None) -> TarIndex:
    """The index of a shard, from the cache folder if it is there for this file as it is. Raises DataError.

    ``spool``: where a shard behind an address is kept if it is read for this.
    """
    kept = _kept(shard, fields)
    if kept is None:
        return _scanned(shard, fields, spool)
    # Processes of one run find out about a shard once.
    with locked_or_stopped(kept.with_suffix(".lock"), "set XDG_CACHE_HOME to another folder", shown_shard(shard)):
        if kept.is_file():
            with contextlib.suppress(Exception), np.load(kept, allow_pickle=False) as arrays:  # damaged: made anew
                return TarIndex(**{field: arrays[field] for field in ARRAYS})
        index, content = _scanned(shard, fields, spool), io.BytesIO()
        np.savez_compressed(content, **{field: getattr(index, field) for field in ARRAYS})
        with contextlib.suppress(OSError):  # on a full disk the next start scans again
            write_atomically(kept, content.getvalue())
        return index


def identity_of(shard: Shard) -> str:
    """A text that changes when a shard changes."""
    if isinstance(shard, RemoteFile):
        return f"{shard.address} {shard.size} {shard.version}"
    found = shard.stat()
    return f"{shard} {found.st_size} {found.st_mtime_ns}"


def _kept(shard: Shard, fields: Fields) -> Path | None:
    """The file of a shard's index; None where the cache folder cannot be written."""
    folder = cache_folder()
    if folder is None:
        return None
    name = f"{LAYOUT} {identity_of(shard)} {fields}"
    file = folder / "webdataset" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.npz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return file if os.access(file.parent, os.W_OK | os.X_OK) else None


def shown_shard(shard: Shard) -> str:
    """A shard's name for messages."""
    return str(shard) if isinstance(shard, RemoteFile) else printable(shard)


def label_field(shard: Shard) -> str:
    """Where the labels of a shard are: cls, or the only field of json with a usual name. Raises DataError."""
    if isinstance(shard, Path):
        return _found_label_field(shard)
    name = f"label {LAYOUT} {identity_of(shard)}"
    return keep(cache_subfolder("webdataset"), name, lambda: _found_label_field(shard).encode()).read_text()


def _found_label_field(shard: Shard) -> str:
    reader = RangeReader(shard, FIRST_BLOCK) if isinstance(shard, RemoteFile) else None
    sample = next(_samples(shard, "json", reader), None)
    if sample is None:
        raise DataError(f"{shown_shard(shard)}: holds no sample; remove it, or write it again")
    key, members, content = sample
    where = f"{shown_shard(shard)} sample {printable(key)}"
    if "cls" in members:
        return "cls"
    there = ", ".join(sorted(members))
    if "json" in members:
        try:
            found = _json(content)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        usual = [field for field in USUAL_FIELDS if field in found]
        if len(usual) == 1:
            return f"json.{usual[0]}"
        there += f"; json has {', '.join(sorted(found)) or 'no field'}"
    raise DataError(
        f"{where}: has no .cls, and no field of .json with a usual name of labels ({there}); "
        "set data.webdataset.label, such as json.FIELD"
    )


def read_member(shard: str | Path, offset: int, size: int) -> bytes:
    """Some bytes of a shard; fewer where the file ends before."""
    with open(shard, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def _scanned(shard: Shard, fields: Fields, spool: Spool | None) -> TarIndex:
    keys, offsets, sizes, labels = list[bytes](), list[int](), list[int](), list[bytes]()
    mistakes = Mistakes()
    extension = "json" if fields.label.startswith("json.") else fields.label.lower()
    reader = SpanReader(shard, spool) if spool is not None and isinstance(shard, RemoteFile) else None
    for key, members, content in _samples(shard, extension, reader):
        try:
            image = members[_image_of(members, fields.image)]
            labels.append(_label_in(content, fields.label).encode() if extension in members else b"")
        except ValueError as error:
            mistakes.add(f"{shown_shard(shard)} sample {printable(key)}", str(error))
            continue
        keys.append(key.encode(errors="surrogateescape"))
        offsets.append(image.offset_data)
        sizes.append(image.size)
        if reader is not None:
            reader.add(image.offset_data, image.size)
    mistakes.check()
    if reader is not None:
        reader.keep()
    if isinstance(shard, RemoteFile):
        check_unchanged(shard)
    return TarIndex(
        np.array(keys, np.bytes_), np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, np.bytes_)
    )


def _samples(
    shard: Shard, wanted: str, reader: RangeReader | None = None
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], bytes]]:
    """The key of each sample, its members by extension, and the beginning of the one with the extension ``wanted``.

    Reads forward alone. Raises DataError for a file that is no whole tar, and for a member that comes twice.
    """
    key, end, content = "", 0, b""
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with _opened(shard, reader) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would hold every header
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, name = os.path.split(member.name.removeprefix("./"))
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem or not extension:
                    continue
                if os.path.join(folder, stem) != key and members:
                    yield key, members, content
                    members, content = {}, b""
                key = os.path.join(folder, stem)
                if extension.lower() in members:
                    raise DataError(
                        f"{shown_shard(shard)} sample {printable(key)}: has two members .{extension}, so two samples "
                        "may have one name; write each sample under a name of its own"
                    )
                members[extension.lower()] = member
                if extension.lower() == wanted:
                    opened = tar.extractfile(member)
                    content = opened.read(MAX_LABEL_BYTES) if opened else b""
            size = file.seek(0, os.SEEK_END)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shown_shard(shard)}: {_no_tar(shard, error)}") from None
    except OSError as error:
        raise DataError(f"{shown_shard(shard)}: cannot be read ({error.strerror}); fix its permissions") from None
    if size < end + tarfile.BLOCKSIZE:
        raise DataError(f"{shown_shard(shard)}: ends without the mark of its end, so it was cut off; copy it again")
    if members:
        yield key, members, content


def _opened(shard: Shard, reader: RangeReader | None) -> BinaryIO:
    if isinstance(shard, RemoteFile):
        return io.BufferedReader(reader or RangeReader(shard))
    return open(shard, "rb")


def _no_tar(shard: Shard, error: Exception) -> str:
    head = RangeReader(shard, 256).read(256) if isinstance(shard, RemoteFile) else first_bytes(shard)
    if kind := COMPRESSED.get(head[:2]):
        return f"is compressed ({kind}), and samples are read at their place in the file; decompress it"
    return looks_like(head) or f"is no whole tar file ({error}); copy it again"


def _image_of(members: dict[str, tarfile.TarInfo], asked: str | None) -> str:
    """The extension of a sample's image. Raises ValueError."""
    if asked is not None:
        if asked.lower().lstrip(".") not in members:
            raise ValueError(f"has no .{asked.lstrip('.')} but {', '.join(members)}; fix data.webdataset.image")
        return asked.lower().lstrip(".")
    found = [name for name in members if f".{name.rpartition('.')[2]}" in image_extensions()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"has {len(found)} images, {', '.join(found)}; choose one: data.webdataset.image={found[0]}")
    raise ValueError(f"has no image but {', '.join(members)}; remove the sample, or set data.webdataset.image")


def _label_in(content: bytes, field: str) -> str:
    """What a sample's label says, or "" where it has none. Raises ValueError."""
    extension, _, name = field.partition(".") if field.startswith("json.") else (field.lower(), "", "")
    if not name:
        try:
            return content.decode().strip()
        except UnicodeDecodeError:
            raise ValueError(f"its .{extension} is not UTF-8 text; choose another data.webdataset.label") from None
    fields = _json(content)
    if name not in fields:
        raise ValueError(f"its .json has no field {name!r}; {nearest(name, fields)}")
    value = fields[name]
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"field {name!r} of its .json is {str(value)[:40]!r}; a label is text or a whole number")
    return str(value).strip()


def _json(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("its .json is no object; write {FIELD: VALUE}")
    return found

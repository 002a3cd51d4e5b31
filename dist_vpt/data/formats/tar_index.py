"""Where the samples of a tar file are: found once by reading its headers, and kept in the cache folder.

With it any sample is read on its own, so that shards are shuffled and resumed as exactly as a folder of images.
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
from typing import Any

import numpy as np

from dist_vpt.data.formats.files import Mistakes
from dist_vpt.data.images import image_extensions
from dist_vpt.distributed.caches import cache_folder
from dist_vpt.errors import DataError, nearest
from dist_vpt.files import first_bytes, locked, looks_like, printable, write_atomically

LAYOUT = 1  # of index files
MAX_LABEL_BYTES = 2**20
USUAL_FIELDS = ("label", "class", "cls", "category", "target", "class_name", "label_name")
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


def read_index(shard: Path, fields: Fields) -> TarIndex:
    """The index of a shard, from the cache folder if it is there for this file as it is. Raises DataError."""
    kept = _kept(shard, fields)
    if kept is None:
        return _scanned(shard, fields)
    # Processes of one run find out about a shard once.
    with locked(kept.with_suffix(".lock"), "set XDG_CACHE_HOME to another folder", timeout=-1):
        if kept.is_file():
            with contextlib.suppress(Exception), np.load(kept, allow_pickle=False) as arrays:  # damaged: made anew
                return TarIndex(**{field: arrays[field] for field in ARRAYS})
        index, content = _scanned(shard, fields), io.BytesIO()
        np.savez_compressed(content, **{field: getattr(index, field) for field in ARRAYS})
        with contextlib.suppress(OSError):  # on a full disk the next start scans again
            write_atomically(kept, content.getvalue())
        return index


def _kept(shard: Path, fields: Fields) -> Path | None:
    """The file of a shard's index; None where the cache folder cannot be written."""
    found, folder = shard.stat(), cache_folder()
    if folder is None:
        return None
    name = f"{LAYOUT} {shard} {found.st_size} {found.st_mtime_ns} {fields}"
    file = folder / "webdataset" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()}.npz"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return file if os.access(file.parent, os.W_OK | os.X_OK) else None


def label_field(shard: Path) -> str:
    """Where the labels of a shard are: cls, or the only field of json with a usual name. Raises DataError."""
    sample = next(_samples(shard), None)
    if sample is None:
        raise DataError(f"{printable(shard)}: holds no sample; remove it, or write it again")
    key, members = sample
    where = f"{printable(shard)} sample {printable(key)}"
    if "cls" in members:
        return "cls"
    there = ", ".join(sorted(members))
    if "json" in members:
        try:
            content = _json(_content(shard, members["json"]))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        usual = [field for field in USUAL_FIELDS if field in content]
        if len(usual) == 1:
            return f"json.{usual[0]}"
        there += f"; json has {', '.join(sorted(content)) or 'no field'}"
    raise DataError(
        f"{where}: has no .cls, and no field of .json with a usual name of labels ({there}); "
        "set data.webdataset.label, such as json.FIELD"
    )


def read_member(shard: str | Path, offset: int, size: int) -> bytes:
    """Some bytes of a shard; fewer where the file ends before."""
    with open(shard, "rb") as file:
        return os.pread(file.fileno(), size, offset)


def _scanned(shard: Path, fields: Fields) -> TarIndex:
    keys, offsets, sizes, labels = list[bytes](), list[int](), list[int](), list[bytes]()
    mistakes = Mistakes()
    for key, members in _samples(shard):
        try:
            image = members[_image_of(members, fields.image)]
            labels.append(_label_of(shard, members, fields.label).encode())
        except ValueError as error:
            mistakes.add(f"{printable(shard)} sample {printable(key)}", str(error))
            continue
        keys.append(key.encode(errors="surrogateescape"))
        offsets.append(image.offset_data)
        sizes.append(image.size)
    mistakes.check()
    return TarIndex(
        np.array(keys, np.bytes_), np.array(offsets, np.int64), np.array(sizes, np.int64), np.array(labels, np.bytes_)
    )


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The key of each sample, and its members by extension. Raises DataError for a file that is no whole tar."""
    key, end = "", 0
    members: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # which would hold every header
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, name = os.path.split(member.name.removeprefix("./"))
                stem, _, extension = name.partition(".")
                if not member.isfile() or not stem or not extension:
                    continue
                if os.path.join(folder, stem) != key and members:
                    yield key, members
                    members = {}
                key = os.path.join(folder, stem)
                members[extension.lower()] = member
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{printable(shard)}: {_no_tar(shard, error)}") from None
    except OSError as error:
        raise DataError(f"{printable(shard)}: cannot be read ({error.strerror}); fix its permissions") from None
    if len(read_member(shard, end, tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise DataError(f"{printable(shard)}: ends without the mark of its end, so it was cut off; copy it again")
    if members:
        yield key, members


def _no_tar(shard: Path, error: Exception) -> str:
    head = first_bytes(shard)
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


def _label_of(shard: Path, members: dict[str, tarfile.TarInfo], field: str) -> str:
    """What a sample's label says, or "" where it has none. Raises ValueError."""
    extension, _, name = field.partition(".") if field.startswith("json.") else (field.lower(), "", "")
    if extension not in members:
        return ""
    content = _content(shard, members[extension])
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


def _content(shard: Path, member: tarfile.TarInfo) -> bytes:
    return read_member(shard, member.offset_data, min(member.size, MAX_LABEL_BYTES))

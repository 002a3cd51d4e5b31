"""The spool: pieces of files that are larger than a disk, kept in a folder of bounded size while they are in use.

All processes of a machine share it: whoever needs a piece first fetches it, the others wait for that. The pieces that
have not been used for longest make room. A piece is there whole or not at all.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_vpt.data.waiting import locked_or_stopped
from dist_vpt.distributed.caches import cache_folder
from dist_vpt.errors import SourceUnavailable, UserError
from dist_vpt.files import is_locked, locked, write_atomically

LOCKS = 256  # files of locks, which pieces share by their names: one for each piece would fill the folder
FIX = "set XDG_CACHE_HOME to a folder on a local disk"
GIB = 2**30


@dataclass(frozen=True)
class Spool:
    """A folder of pieces, which takes at most ``budget`` bytes as long as each piece is smaller than that."""

    folder: Path
    budget: int

    def open(self, name: str, size: int, write: Callable[[BinaryIO], None]) -> BinaryIO:
        """The file of a piece, which stays readable while it is open; ``write`` fetches it where it is not there.

        ``size``: the bytes that it will have, about. Raises what ``write`` raises, SourceUnavailable where the disk
        is full, and Interrupted for a stop signal while another fetches it.
        """
        file = self.folder / hashlib.sha256(os.fsencode(name)).hexdigest()
        if (found := _opened(file)) is not None:
            return found
        with locked_or_stopped(self._lock(file.name), FIX):
            if (found := _opened(file)) is not None:  # another process has fetched it
                return found
            return self._fetched(file, size, write)

    def _fetched(self, file: Path, size: int, write: Callable[[BinaryIO], None]) -> BinaryIO:
        temporary = file.with_name(f"{file.name}.tmp")
        try:
            with locked(self.folder / "room.lock", FIX, timeout=-1):
                temporary.unlink(missing_ok=True)  # of a process that was killed
                self._make_room(size)
                with open(temporary, "wb") as reserved:
                    reserved.truncate(size)
            with open(temporary, "r+b") as opened:
                write(opened)
                opened.truncate()
            with locked(self.folder / "room.lock", FIX, timeout=-1):  # or who makes room could count it under no name
                if temporary.stat().st_size > size:  # repeated images are stored once in Parquet
                    self._make_room(0)
                found = open(temporary, "rb")  # noqa: SIM115 (which keeps it, if it is the next to make room)
                os.replace(temporary, file)
                return found
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SourceUnavailable(
                f"{self.folder}: the disk is full ({error.strerror}); free space there, lower data.streaming_disk_gib, "
                f"or {FIX}"
            ) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the pieces that have not been used for longest, until ``size`` bytes more are within the budget."""
        pieces = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".lock"):
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:
                continue
            # What is being fetched counts and stays.
            removable = not entry.name.endswith(".tmp") or not is_locked(self._lock(entry.name.removesuffix(".tmp")))
            pieces.append((found.st_mtime_ns, found.st_size, entry.path, removable))
        total = size + sum(piece[1] for piece in pieces)
        for _, freed, path, removable in sorted(pieces):
            if total <= self.budget:
                return
            if removable:
                Path(path).unlink(missing_ok=True)
                total -= freed

    def _lock(self, name: str) -> Path:
        return self.folder / f"{int(name[:8], 16) % LOCKS:03d}.lock"


def open_spool(gib: float) -> Spool:
    """The spool in the cache folder, of at most ``gib`` GiB."""
    return Spool(cache_subfolder("pieces"), int(gib * GIB))


def cache_subfolder(name: str) -> Path:
    """A folder in the cache folder, made where it is missing. Raises UserError where it cannot be written."""
    cache = cache_folder()
    if cache is None:
        raise UserError(f"streamed data needs a cache folder, and this user has no home; {FIX}")
    folder = cache / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); {FIX}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written; {FIX}")
    return folder


def keep(folder: Path, name: str, content: Callable[[], bytes]) -> Path:
    """A file of the cache folder, which the processes of a run make once. The first word of ``name`` is its kind."""
    file = folder / hashlib.sha256(os.fsencode(name)).hexdigest()
    with locked_or_stopped(folder / f"{name.partition(' ')[0]}-{file.name[:2]}.lock", FIX):
        if not file.is_file():
            write_atomically(file, content())
    return file


def _opened(file: Path) -> BinaryIO | None:
    try:
        found = open(file, "rb")  # noqa: SIM115 (closed by the caller)
    except FileNotFoundError:
        return None
    os.utime(found.fileno())
    return found

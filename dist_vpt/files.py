"""Files that come with the package, files written whole or not at all, and locks on them."""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout, lock_descriptor

from dist_vpt.errors import RunFailed, RunFolderError, UserError

POLL_SECONDS = 0.05  # between two attempts at a lock
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers
LOOK_SECONDS = 0.25  # for which is_locked of other processes may keep a free lock from being acquired


def shipped_folder(name: str) -> Path:
    """``configs`` or ``launch``: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def new_folder(out: str | Path) -> Path:
    """The folder that ``--out`` names, made where it is missing. Raises UserError where it holds files."""
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used ({error.strerror}); name another folder") from error
    if found:
        raise UserError(f"--out {folder}: holds files ({', '.join(found[:3])}); name a new or an empty folder")
    return folder


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file whole or not at all, also through a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Return when the disk has a file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def raising_disk_full(what: str, folder: Path, then: str) -> Iterator[None]:
    """Raise RunFailed where a write within fails; ``then``: what to do once space has been freed."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has gone
        raise
    except OSError as error:
        raise RunFailed(f"{folder}: {what} cannot be written ({error}); free space there, then {then}") from error


@contextmanager
def locked(
    file: Path, fix: str, *, timeout: float = 0, cancel: Callable[[], bool] | None = None, holder: str = ""
) -> Iterator[bool]:
    """Hold a lock that the system releases when this process ends, however it ends; yields whether it was acquired.

    ``timeout``: seconds to wait for it; -1 waits until it is free, or until ``cancel`` returns true. ``holder``: who
    has it, as the content of the file. ``fix`` ends the message of the RunFolderError for a file that cannot be opened
    and for a file system without locks.
    """

    def write_holder(descriptor: int) -> None:
        if holder:
            with contextlib.suppress(OSError):  # a full disk does not void a lock
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
                os.fsync(descriptor)  # or other machines see it late

    try:
        open(file, "ab").close()
    except OSError as error:
        raise RunFolderError(
            f"{file}: cannot be opened ({error.strerror}); free space or fix permissions there, or {fix}"
        ) from error
    # A soft lock, filelock's fallback, would outlive a process that is killed.
    lock, acquired = FileLock(file, fallback_to_soft=False, on_acquired=write_holder if holder else None), False
    try:
        lock.acquire(timeout, poll_interval=POLL_SECONDS, cancel_check=cancel)
        acquired = True
    except Timeout:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RunFolderError(f"{file}: cannot be locked ({error}); fix its permissions, or {fix}") from error
        raise RunFolderError(
            f"{file}: this file system has no locks ({error.strerror}); mount it with them (Lustre: flock), or {fix}"
        ) from error
    try:
        yield acquired
    finally:
        if acquired:
            lock.release()


def lock_nowait(descriptor: int) -> None:
    """Lock an open file that nobody else may hold, until it is closed. Raises BlockingIOError where somebody does."""
    deadline = time.monotonic() + LOOK_SECONDS
    while not lock_descriptor(descriptor, blocking=False):
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        time.sleep(POLL_SECONDS)


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock on the file.

    Asked with a shared lock, which filelock does not have: with an exclusive one, two processes that look at the same
    time would take each other for its holder.
    """
    try:
        with open(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def printable(name: str | Path) -> str:
    """A file's name for people: bytes that are not UTF-8 and control characters are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


def looks_like(head: bytes) -> str:
    """What a file's first bytes say it is in place of what was asked for, with the fix; "" for any other content."""
    if not head:
        return "the file is empty; download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; run git lfs pull"
    if re.match(rb"\s*<(!doctype html|html)", head, re.IGNORECASE):
        return "a web page in place of the file; download the file itself"
    return ""


def first_bytes(path: str | Path) -> bytes:
    """The beginning of a file; a byte of no meaning where it cannot be read."""
    try:
        with open(path, "rb") as opened:
            return opened.read(256)
    except OSError:
        return b"?"


def to_json(content: Any, indent: int | None = None) -> str:
    """JSON, with null for numbers that are not finite: standard JSON has none of these."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=indent)


def read_json(path: Path) -> dict[str, Any]:
    """The content, an object, of a run folder's file. Raises RunFolderError where it is damaged or cannot be read."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error.strerror}); restore the file or start the run again"
        ) from error
    except ValueError as error:
        raise RunFolderError(f"{path}: damaged ({error}); restore the file or start the run again") from error

"""Files that come with the package, files written whole or not at all, and locks on them."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_vpt.errors import RunFailed, RunFolderError


def shipped_folder(name: str) -> Path:
    """``configs`` or ``launch``: inside an installed package, beside the package in a clone."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


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
    """Raise RunFailed where the disk does not take what is written within; ``then``: what comes once there is room."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone
        raise
    except OSError as error:
        raise RunFailed(f"{folder}: {what} cannot be written ({error}); free space there, then {then}") from error


def lock_nowait(descriptor: int) -> None:
    """Lock a file that nobody else may hold; ``dist-vpt status`` and processes that wait look at it for a moment.

    Raises BlockingIOError where somebody holds it.
    """
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.05)
    return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(file: Path) -> bool:
    """Whether a process holds a lock on the file."""
    try:
        with open(file) as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_json(path: Path) -> Any:
    """A file of a run folder. Raises RunFolderError for a damaged one, and for one that is gone."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error.strerror}); restore the file or start the run again"
        ) from error
    except ValueError as error:
        raise RunFolderError(f"{path}: damaged ({error}); restore the file or start the run again") from error

"""The status of this process, and the file that reports it to the other processes of the run."""

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_vpt.files import lock_nowait

SILENT_SECONDS = 120.0  # without a heartbeat a process of another machine is gone: locks may not reach so far
FILE_BYTES = 2000  # of a rank's file, which is written in place: a new file would not be the locked one

logger = logging.getLogger("dist_vpt")  # to the process's own log, unless that is train.log


@dataclass
class RankStatus:
    """The current activity of this process, set by the main thread and read by the watchdog's thread."""

    phase: str = "the start"
    doing: str = "starting"
    collectives: int = 0  # sums over all processes so far: the same on all that keep pace
    waiting: bool = False  # in such a sum
    limited: bool = False  # whether staying here for run.timeout_minutes means that something hangs
    since: float = 0.0  # monotonic seconds
    progress: dict[str, float] = field(default_factory=dict)  # of the run, on its first process

    def set(self, phase: str, doing: str, *, limited: bool = False) -> None:
        """Enter a phase of the run."""
        self.phase, self.doing, self.limited, self.since = phase, doing, limited, time.monotonic()

    @property
    def description(self) -> str:
        """For messages, such as "step 7: reading images"."""
        return f"{self.phase}: {'waiting for the others' if self.waiting else self.doing}"

    @contextmanager
    def in_collective(self) -> Iterator[None]:
        """Within a sum over all processes."""
        self.waiting, self.since = True, time.monotonic()
        try:
            yield
        finally:
            self.waiting, self.since = False, time.monotonic()
            self.collectives += 1


class RankFile:
    """RUN/ranks/rank-N.json, which process N writes every few seconds and locks for as long as it lives."""

    def __init__(self, run: Path, rank: int, world: int, status: RankStatus):
        self.rank, self.world, self.status = rank, world, status
        self.path = run / "ranks" / f"rank-{rank}.json"
        self.left = False  # whether this process has ended its part of the run
        self._heartbeats = 0
        self._descriptor: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether this process can report what it is doing."""
        return self._descriptor is not None

    def open(self) -> None:
        """Raises BlockingIOError where another process holds the file, OSError where there can be none."""
        self.path.parent.mkdir(exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_nowait(self._descriptor)
        except BlockingIOError:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        self.write()

    def content(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "rank": self.rank,
            "world": self.world,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "what": self.status.description[:200],
            "meetings": self.status.collectives,
            "waiting": self.status.waiting,
            "beat": self._heartbeats,
            "time": round(time.time(), 1),
            "left": self.left,
            "progress": self.status.progress,
        }

    def write(self) -> None:
        """Give a heartbeat."""
        self._heartbeats += 1
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, (json.dumps(self.content()).ljust(FILE_BYTES - 1) + "\n").encode(), 0)
                if self.world > 1:  # or other machines see it late
                    os.fsync(self._descriptor)

    def replaced(self) -> bool:
        """Whether the run was started again in the folder, while this process hung."""
        try:
            if self._descriptor is None:  # it cannot report, but it still watches the others
                return False
            return os.fstat(self._descriptor).st_ino != os.stat(self.path).st_ino
        except OSError:
            return True

    def close(self) -> None:
        """Write a last time, and release the lock."""
        self.left = True
        self.write()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_rank_status(run: Path, rank: int) -> dict[str, Any]:
    """The newest report of a process; {} where there is none yet."""
    try:
        content = json.loads((run / "ranks" / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def rank_name(report: dict[str, Any]) -> str:
    """A process, for messages."""
    return f"process {report['rank']} of {report['world']} (pid {report['pid']} on {report['host']})"

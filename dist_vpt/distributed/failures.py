"""Which process of a run failed first: one that recorded its failure, or one that is gone or late by its reports.

    RUN/ranks/failed.json   the first failure: which process, what, where, and the exit code of the others

torchelastic, on which `accelerate launch` runs, knows the exit codes of one node's processes and ends those 30 s after
it has asked them to stop. It knows no other node's, nor a process that hangs; so that is found out here.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_vpt.distributed.rank_status import SILENT_SECONDS, RankFile, rank_name, read_rank_status
from dist_vpt.errors import ProcessFailed, UserError
from dist_vpt.files import is_locked

LISTED = 8  # processes that a message names


class Folder(Protocol):
    """The part of a run folder that the watchdog uses."""

    path: Path
    log: Path

    def status(self) -> dict[str, Any]:
        """The content of run.json."""

    def mark(self, status: str, **facts: Any) -> None:
        """Write the status of the run."""


@dataclass(frozen=True)
class Failure:
    """The content of failed.json."""

    rank: int
    reason: str
    exit_code: int = ProcessFailed.exit_code  # of the other processes

    def error(self) -> ProcessFailed:
        """The exception for the other processes to raise."""
        error = ProcessFailed(self.reason)
        error.exit_code = self.exit_code
        error.shared = self.rank != 0  # the first process reports it, unless it is the one
        return error


class FailureDetector:
    """Finds the first failure among the processes of a run; ``heartbeat``: seconds between two reports of each."""

    def __init__(self, folder: Folder, rank_file: RankFile, minutes: float, heartbeat: float, leaving: threading.Event):
        self.folder, self.rank_file, self.minutes, self.heartbeat = folder, rank_file, minutes, heartbeat
        self._leaving = leaving
        self._seen: dict[int, tuple[int, float]] = {}  # each process's newest heartbeat, and when it was first seen
        self._file = rank_file.path.with_name("failed.json")

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.rank_file.world) if rank != self.rank_file.rank]

    def recorded(self) -> Failure | None:
        """The failure that a process has recorded."""
        try:
            return Failure(**json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def record(self, failure: Failure) -> Failure:
        """Let all processes know a failure; returns the one that was recorded first."""
        if not self.rank_file.is_open:
            return failure
        temporary = self._file.with_name(f".failed-{self.rank_file.rank}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(failure)) + "\n")
            _link(temporary, self._file)
        except FileExistsError:
            failure = self.recorded() or failure
        except OSError:  # all others will find this process gone
            return failure
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError, UserError):
            if self.folder.status().get("status") == "running":
                self.folder.mark("failed", reason=failure.reason)
        return failure

    def peer_failure(self) -> Failure | None:
        """Why another process broke a collective call: it recorded a failure, is gone, has left, or is late."""
        deadline = time.monotonic() + 3 * self.heartbeat
        while time.monotonic() < deadline:
            failure = self.recorded() or self.any_gone()
            if failure is not None:
                return failure
            time.sleep(0.05)
        left = next((rank for rank in self._others if self._report(rank).get("left")), None)
        return self._record_gone(left) if left is not None else self._record_late()

    def any_gone(self) -> Failure | None:
        """Whether any other process is gone."""
        gone = (rank for rank in self._others if self._gone(rank, 0.0, 2 * self.heartbeat))
        return next((self._record_gone(rank) for rank in gone), None)

    def missing(self) -> Failure | None:
        """Whether the next process, in a ring, is gone, or another keeps all waiting for longer than the timeout."""
        following = (self.rank_file.rank + 1) % self.rank_file.world
        if self._gone(following, 1.5 * self.heartbeat, SILENT_SECONDS):
            return self._record_gone(following)
        status, limit = self.rank_file.status, 60 * self.minutes
        collectives = status.collectives
        if (status.waiting or status.limited) and time.monotonic() - status.since > limit:
            late = self._late()
            moved = status.collectives != collectives or time.monotonic() - status.since < limit
            if late is not None and not moved and not self._leaving.is_set():
                return self.recorded() or self.record(late)
        return None

    def _record_late(self) -> Failure | None:
        late = self._late()
        return self.record(late) if late is not None else None

    def _late(self) -> Failure | None:
        """The processes that keep the others waiting."""
        ranks = range(self.rank_file.world)
        before = {rank: self._report(rank) for rank in ranks}
        if self._leaving.wait(2.5 * self.heartbeat):  # long enough for a heartbeat of each
            return None
        reports = {rank: report for rank in ranks if (report := self._report(rank))}
        silent = {rank for rank in reports if reports[rank]["beat"] == before[rank].get("beat")} - {self.rank_file.rank}
        pace = {rank: (report["meetings"], report["waiting"]) for rank, report in reports.items()}
        late = [rank for rank in pace if pace[rank] < max(pace.values()) or rank in silent]
        limit, status = f"{self.minutes:g} minutes (run.timeout_minutes)", self.rank_file.status
        logs = f"{self.folder.log} and {self.folder.path / 'logs'}"
        fix = f"see {logs} for where each one was; if it is only slow, raise run.timeout_minutes"
        if not late:
            reason = f"{self.folder.path}: no progress for {limit}, all at {status.description}; {fix}"
            return Failure(self.rank_file.rank, reason)
        listed = [
            f"{rank_name(reports[rank])} did not join the others for {limit}: it is at {reports[rank]['what']}"
            + (", and gives no heartbeat" if rank in silent else "")
            for rank in late[:LISTED]
        ]
        more = [f"and {len(late) - LISTED} more"] if len(late) > LISTED else []
        return Failure(late[0], "; ".join([*listed, *more, f"the others wait at {status.phase}", fix]))

    def _gone(self, rank: int, silent: float, silent_elsewhere: float) -> bool:
        """Whether a process has ended without a report: it holds no lock and gave no heartbeat for so many seconds.

        One that has not reported yet is not gone.
        """
        report = self._report(rank)
        if not report or report["left"]:
            return False
        heartbeat, since = self._seen.get(rank, (-1, 0.0))
        if heartbeat != report["beat"]:
            since = time.monotonic()
            self._seen[rank] = (report["beat"], since)
        if is_locked(self.rank_file.path.with_name(f"rank-{rank}.json")):
            return False
        here = report["host"] == socket.gethostname()
        return time.monotonic() - since >= (silent if here else silent_elsewhere)

    def _record_gone(self, rank: int) -> Failure:
        report = self._report(rank)
        if report.get("left"):
            left = Failure(rank, f"{rank_name(report)} left before the end (by control-C?)")
            return self.recorded() or self.record(left)
        return self.record(
            Failure(
                rank,
                f"{rank_name(report)} ended without reporting an error (last seen at {report['what']}): it was killed "
                "(out of memory? see dmesg or the job's log), or its machine is gone; run.resume=auto continues from "
                "the newest state",
            )
        )

    def _report(self, rank: int) -> dict[str, Any]:
        return read_rank_status(self.folder.path, rank) if rank != self.rank_file.rank else self.rank_file.content()


def _link(source: Path, target: Path) -> None:
    """Raises FileExistsError where the target is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.replace(source, target)

"""The processes of one run: where each stands, which one failed first, and an end for all where one is gone or hangs.

    RUN/ranks/rank-N.json   where process N stands, told every few seconds; locked for as long as the process lives
    RUN/ranks/failed.json   the first failure: which process, what, where, and the exit code of the others
    RUN/logs/rank-N.log     warnings and errors of process N and where it stood; the first one has train.log

A collective call with a process that is gone raises at once (gloo) or does not return (NCCL), and says in neither case
which process was the first and why. So a thread beside the training of each process looks at the lock of the process
after its own, in a ring, and at failed.json; it needs no process group, and adds no collective call.
"""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from dist_vpt.distributed.rank_status import logger, phase, read_rank_status
from dist_vpt.distributed.rendezvous import MARGIN_SECONDS, is_peer_failure
from dist_vpt.errors import Interrupted, ProcessFailed, RunFolderError, UserError
from dist_vpt.files import is_locked, lock_nowait

BEAT_SECONDS = 5.0  # between two signs of life; a tenth of the timeout where that is shorter
POLL_SECONDS = 2.0  # between two looks at the others; likewise
SILENT_SECONDS = 120.0  # without a sign of life a process of another machine is gone: locks may not reach so far
LEAVE_SECONDS = 5.0  # a process that can leave by itself has so long
ROOM = 2000  # bytes of a rank's file, which is written in place: a new file would not be the locked one


class Folder(Protocol):
    """What the watchdog uses of a run folder."""

    path: Path
    log: Path

    def status(self) -> dict[str, Any]:
        """The content of run.json."""

    def mark(self, status: str, **facts: Any) -> None:
        """Write the status of the run."""


class RankWatchdog:
    """Held by every process of a run while it trains; ``minutes``: how long one may keep the others waiting.

    Entered where all have agreed that the folder is theirs. Raises ProcessFailed, with the first failure's reason, in
    place of what a process meets because of another; a process that cannot come back to raise it is ended.
    """

    def __init__(self, folder: Folder, rank: int, world: int, minutes: float):
        self.folder, self.rank, self.world, self.minutes = folder, rank, world, minutes
        self.told, self.first = folder.path / "ranks", folder.path / "ranks" / "failed.json"
        self.log = folder.path / "logs" / f"rank-{rank}.log" if rank else folder.log
        self.beat = min(BEAT_SECONDS, 6 * minutes)
        self.poll = min(POLL_SECONDS, 6 * minutes)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ranks")
        self._beats = 0
        self._seen: dict[int, tuple[int, float]] = {}  # of each process the last sign of life, and when it was new
        self._descriptor: int | None = None
        self._handler: logging.Handler | None = None

    def __enter__(self) -> "RankWatchdog":
        phase.progress = {}
        try:
            self.told.mkdir(exist_ok=True)
            self._descriptor = os.open(self.told / f"rank-{self.rank}.json", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                lock_nowait(self._descriptor)
            except BlockingIOError:
                os.close(self._descriptor)
                raise RunFolderError(
                    f"{self.folder.path}: another process {self.rank} of {self.world} is at work here; wait for the "
                    "end of its run or choose another run.dir"
                ) from None
            self._tell()
        except OSError as error:  # a full disk must not end a run that needs none
            said = f"warning: {error}: process {self.rank} cannot tell where it stands, and no other sees its end"
            print(said, file=sys.stderr, flush=True)
        if self.rank:
            self._open_log()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self.world > 1:
                self._fail(error)
        finally:
            self._left.set()
            self._thread.join(LEAVE_SECONDS)  # or it might write into a file that gets the descriptor next
            self._tell()
            self._close_log()
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _fail(self, error: BaseException) -> None:
        """Tell the others of this process's failure, or raise theirs in its place."""
        if isinstance(error, Interrupted) and not error.shared and (failure := self._failure() or self._any_gone()):
            raise _as_error(failure) from error  # stopped by a launcher, because of another process
        agreed = isinstance(error, UserError) and error.shared and not isinstance(error, ProcessFailed)
        agreed |= isinstance(error, Interrupted)
        if agreed or isinstance(error, KeyboardInterrupt) or self._superseded():
            return
        if isinstance(error, ProcessFailed):  # of a run within a sweep: the sweep fails with its reason
            self._record(int(error.shared), str(error), error.exit_code)
            return
        self._open_log()
        failure = self._first_failure() if is_peer_failure(error) else None
        if failure is None:
            said, own = str(error).strip()[:2000], isinstance(error, UserError)
            where = "" if own else f" at {phase.what} (traceback in {self.log})"
            said = said if own else f"{type(error).__name__}: {said}"
            # Where starting again is of no use, that is what all exit codes must say.
            code = error.exit_code if isinstance(error, UserError) else ProcessFailed.exit_code
            told = self._record(self.rank, f"{_named(self._own())}: {said}{where}", code)
            logger.error("\n".join([told["reason"], *traceback.format_exception(error)]))
            return
        logger.error(failure["reason"])
        failed = _as_error(failure)
        leaving = threading.Timer(MARGIN_SECONDS, os._exit, [failed.exit_code])
        leaving.daemon = True  # the rest of this process may wait for one that is gone
        leaving.start()
        raise failed from error

    def _first_failure(self) -> dict[str, Any] | None:
        """Why another process broke a collective call: what it told, or that it is gone, or that it hangs."""
        deadline = time.monotonic() + 3 * self.beat
        while time.monotonic() < deadline:
            failure = self._failure() or self._any_gone()
            if failure is not None:
                return failure
            time.sleep(0.05)
        for rank in range(self.world):
            if rank != self.rank and self._place(rank).get("left"):
                return self._record_gone(rank)
        late = self._late()
        return self._record(*late) if late is not None else None

    def _any_gone(self) -> dict[str, Any] | None:
        for rank in range(self.world):
            if rank != self.rank and self._gone(rank, 0.0, 2 * self.beat):
                return self._record_gone(rank)
        return None

    def _watch(self) -> None:
        """The thread: tells where this process stands, and ends it where the run is lost and it does not see that."""
        told = 0.0
        while not self._left.wait(self.poll):
            if time.monotonic() - told >= self.beat:
                self._tell()
                told = time.monotonic()
            if self.world == 1:
                continue
            failure = self._started_again() if self._superseded() else self._failure() or self._missed()
            if failure is not None and not self._left.wait(LEAVE_SECONDS):
                self._end(failure)

    def _missed(self) -> dict[str, Any] | None:
        """The next process is gone, or another did not come for so long that none will."""
        after = (self.rank + 1) % self.world
        if self._gone(after, 1.5 * self.beat, SILENT_SECONDS):
            return self._record_gone(after)
        limit, meetings = 60 * self.minutes, phase.meetings
        if (phase.waiting or phase.limited) and time.monotonic() - phase.since > limit:
            late = self._late()
            moved = phase.meetings != meetings or time.monotonic() - phase.since < limit
            if late is not None and not moved and not self._left.is_set():
                return self._failure() or self._record(*late)
        return None

    def _end(self, failure: dict[str, Any]) -> NoReturn:
        """End this process from beside its training, which waits in vain or hangs."""
        error = _as_error(failure)
        with contextlib.suppress(OSError):
            self._open_log()
            logger.error(f"{error}\nended at {phase.what}, here:")
            with open(self.log, "a") as file:
                faulthandler.dump_traceback(file)
        if self.rank == 0 or not error.shared:
            print(f"{f'[process {self.rank}] ' if self.rank else ''}error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _late(self) -> tuple[int, str] | None:
        """The process that keeps the others waiting, and what to say of it."""
        before = {rank: self._place(rank) for rank in range(self.world)}
        if self._left.wait(2.5 * self.beat):  # long enough for a sign of life of each
            return None
        places = {rank: self._place(rank) for rank in range(self.world)}
        known = {rank: place for rank, place in places.items() if place}
        silent = {rank for rank in known if known[rank]["beat"] == before[rank].get("beat") and rank != self.rank}
        pace = {rank: (place["meetings"], place["waiting"]) for rank, place in known.items()}
        late = [rank for rank in pace if pace[rank] < max(pace.values()) or rank in silent]
        limit = f"{self.minutes:g} minutes (run.timeout_minutes)"
        logs = f"{self.folder.log} and {self.folder.path / 'logs'}"
        mend = f"what each was at is in {logs}; if it is only slow, raise run.timeout_minutes"
        if not late:
            return self.rank, f"{self.folder.path}: nothing moved for {limit}, all at {phase.what}; {mend}"
        told = [
            f"{_named(places[rank])} did not come for {limit}: it stands at {places[rank]['what']}"
            + (", and shows no sign of life" if rank in silent else "")
            for rank in late[:8]
        ]
        more = [f"and {len(late) - 8} more"] if len(late) > 8 else []
        return late[0], "; ".join([*told, *more, f"the others wait at {phase.place}", mend])

    def _gone(self, rank: int, silent: float, silent_elsewhere: float) -> bool:
        """Whether a process has ended without a word: it holds no lock and has given no sign of life for so long.

        One that has not begun to tell where it stands is not gone.
        """
        place = self._place(rank)
        if not place or place["left"]:
            return False
        beat, since = self._seen.get(rank, (-1, 0.0))
        if beat != place["beat"]:
            since = time.monotonic()
            self._seen[rank] = (place["beat"], since)
        if is_locked(self.told / f"rank-{rank}.json"):
            return False
        here = place["host"] == socket.gethostname()
        return time.monotonic() - since >= (silent if here else silent_elsewhere)

    def _record_gone(self, rank: int) -> dict[str, Any]:
        place = self._place(rank)
        if place.get("left"):
            return self._failure() or self._record(rank, f"{_named(place)} left before the end (by control-C?)")
        return self._record(
            rank,
            f"{_named(place)} ended without a word (its last: {place['what']}): it was killed (did memory run out? "
            "see dmesg or the job's log), or its machine is gone; run.resume=auto goes on from the newest state",
        )

    def _record(self, rank: int, reason: str, exit_code: int = ProcessFailed.exit_code) -> dict[str, Any]:
        """Tell all of a failure, unless another was told before, which is returned then."""
        failure = {"rank": rank, "reason": reason, "exit_code": exit_code}
        if self._descriptor is None:
            return failure
        temporary = self.told / f".failed-{self.rank}.tmp"
        try:
            temporary.write_text(json.dumps(failure) + "\n")
            _link(temporary, self.first)
        except FileExistsError:
            failure = self._failure() or failure
        except OSError:  # all others find this process gone
            return failure
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError, UserError):
            if self.folder.status().get("status") == "running":
                self.folder.mark("failed", reason=failure["reason"])
        return failure

    def _failure(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.first.read_text())
        except (OSError, ValueError):
            return None

    def _superseded(self) -> bool:
        """Whether the run was started again in the folder, while this process hung."""
        try:
            if self._descriptor is None:  # it could not tell where it stands: it still looks at the others
                return False
            return os.fstat(self._descriptor).st_ino != os.stat(self.told / f"rank-{self.rank}.json").st_ino
        except OSError:
            return True

    def _started_again(self) -> dict[str, Any] | None:
        """Why this process has no run any more; nothing where its folder was removed, which ends no run."""
        if not (self.told / f"rank-{self.rank}.json").exists():
            return None
        reason = f"{_named(self._own())}: its run was started again while it hung"
        return {"rank": self.rank, "reason": reason, "exit_code": ProcessFailed.exit_code}

    def _place(self, rank: int) -> dict[str, Any]:
        return read_rank_status(self.folder.path, rank) if rank != self.rank else self._own()

    def _own(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world": self.world,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "what": phase.what[:200],
            "meetings": phase.meetings,
            "waiting": phase.waiting,
            "beat": self._beats,
            "time": round(time.time(), 1),
            "left": self._left.is_set(),
            "progress": phase.progress,
        }

    def _tell(self) -> None:
        self._beats += 1
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._descriptor, (json.dumps(self._own()).ljust(ROOM - 1) + "\n").encode(), 0)
                if self.world > 1:  # or other machines see it late
                    os.fsync(self._descriptor)

    def _open_log(self) -> None:
        """Warnings of all packages and what this one tells go to the process's own log."""
        if self._handler is not None:
            return
        with contextlib.suppress(OSError):
            self.log.parent.mkdir(exist_ok=True)
            self._handler = logging.FileHandler(self.log, delay=True)
            self._handler.addFilter(_Once())
            self._handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False  # or it would be on the terminal too
            if self.rank:
                logging.getLogger().addHandler(self._handler)
                logging.captureWarnings(True)
                logger.info(_named(self._own()))

    def _close_log(self) -> None:
        if self._handler is None:
            return
        if self.rank:
            logging.captureWarnings(False)
        for target in (logging.getLogger(), logger):
            target.removeHandler(self._handler)
        self._handler.close()
        self._handler = None


def _link(source: Path, target: Path) -> None:
    """Raises FileExistsError where the target is there."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.replace(source, target)


class _Once(logging.Filter):
    """Lets a warning through that has not been told yet: some come with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said, warns = record.getMessage(), record.levelno == logging.WARNING
        new = said not in self.told
        if warns:
            self.told.add(said)
        return new or not warns


def _named(place: dict[str, Any]) -> str:
    return f"process {place['rank']} of {place['world']} (pid {place['pid']} on {place['host']})"


def _as_error(failure: dict[str, Any]) -> ProcessFailed:
    error = ProcessFailed(failure["reason"])
    error.exit_code = failure["exit_code"]
    error.shared = failure["rank"] != 0  # the first process tells it, unless it is the one
    return error

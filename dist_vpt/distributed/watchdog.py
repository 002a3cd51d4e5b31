"""An end for all processes of a run where one has failed, is gone or hangs, with the reason of the first.

A collective call with a process that is gone raises at once (gloo) or does not return (NCCL), and in neither case gives
the first failure and its reason. So a thread in each process watches the lock of the next process, in a ring, and
failed.json; it needs no process group, and adds no collective call.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NoReturn

from dist_vpt.distributed.failures import Failure, FailureDetector, Folder
from dist_vpt.distributed.rank_log import RankLog
from dist_vpt.distributed.rank_status import RankFile, RankStatus, logger, rank_name
from dist_vpt.distributed.rendezvous import MARGIN_SECONDS, is_peer_failure
from dist_vpt.errors import Interrupted, ProcessFailed, RunFolderError, UserError

BEAT_SECONDS = 5.0  # between two heartbeats; a tenth of the timeout where that is shorter
POLL_SECONDS = 2.0  # between two looks at the others; likewise
LEAVE_SECONDS = 5.0  # that a process has to end by itself


class RankWatchdog:
    """Held by every process of a run while it trains; ``minutes``: how long one may keep the others waiting.

    Entered where all have agreed to use the folder. Raises ProcessFailed, with the first failure's reason, in place of
    an error that is due to another process; a process that cannot return to raise it is ended.
    """

    def __init__(self, folder: Folder, rank: int, world: int, minutes: float, status: RankStatus):
        self.folder, self.status = folder, status
        self.heartbeat = min(BEAT_SECONDS, 6 * minutes)
        self.poll = min(POLL_SECONDS, 6 * minutes)
        self.log = RankLog(folder.path / "logs" / f"rank-{rank}.log" if rank else folder.log, captures_all=rank > 0)
        self.rank_file = RankFile(folder.path, rank, world, status)
        self._leaving = threading.Event()
        self._failures = FailureDetector(folder, self.rank_file, minutes, self.heartbeat, self._leaving)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="ranks")

    def __enter__(self) -> "RankWatchdog":
        rank, world = self.rank_file.rank, self.rank_file.world
        self.status.progress = {}
        try:
            self.rank_file.open()
        except BlockingIOError:
            raise RunFolderError(
                f"{self.folder.path}: another process {rank} of {world} is running in it; wait for the end of its run "
                "or choose another run.dir"
            ) from None
        except OSError as error:  # a full disk must not end a run that needs none
            message = f"warning: {error}: process {rank} cannot report its status, and no other process sees its end"
            print(message, file=sys.stderr, flush=True)
        if rank:
            self.log.open(rank_name(self.rank_file.content()))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self.rank_file.world > 1:
                self._fail(error)
        finally:
            self._leaving.set()
            self._thread.join(LEAVE_SECONDS)  # or it might write into a file that gets the descriptor next
            self.rank_file.close()
            self.log.close()

    def _fail(self, error: BaseException) -> None:
        """Report this process's failure to the others, or raise theirs in its place."""
        stopped_alone = isinstance(error, Interrupted) and not error.shared
        if stopped_alone and (failure := self._failures.recorded() or self._failures.any_gone()):
            raise failure.error() from error  # a launcher stopped this process because of another one
        by_all = isinstance(error, UserError) and error.shared and not isinstance(error, ProcessFailed)
        if by_all or isinstance(error, (Interrupted, KeyboardInterrupt)) or self.rank_file.replaced():
            return
        if isinstance(error, ProcessFailed):  # of a run within a sweep: the sweep fails with its reason
            self._failures.record(Failure(int(error.shared), str(error), error.exit_code))
            return
        self._open_log()
        failure = self._failures.peer_failure() if is_peer_failure(error) else None
        if failure is None:
            failure = self._failures.record(self._own_failure(error))
            logger.error("\n".join([failure.reason, *traceback.format_exception(error)]))
            return
        logger.error(failure.reason)
        leaving = threading.Timer(MARGIN_SECONDS, os._exit, [failure.exit_code])
        leaving.daemon = True  # the rest of this process may wait for one that is gone
        leaving.start()
        raise failure.error() from error

    def _own_failure(self, error: BaseException) -> Failure:
        name, message = rank_name(self.rank_file.content()), str(error).strip()[:2000]
        if isinstance(error, UserError):  # where a restart is of no use, all exit codes must say so
            return Failure(self.rank_file.rank, f"{name}: {message}", error.exit_code)
        where = f"at {self.status.description} (traceback in {self.log.path})"
        return Failure(self.rank_file.rank, f"{name}: {type(error).__name__}: {message} {where}")

    def _watch(self) -> None:
        """The thread: gives heartbeats, and ends this process where the run has failed and it does not notice."""
        last = 0.0
        while not self._leaving.wait(self.poll):
            if time.monotonic() - last >= self.heartbeat:
                self.rank_file.write()
                last = time.monotonic()
            if self.rank_file.world == 1:
                continue
            if self.rank_file.replaced():
                failure = self._restarted()
            else:
                failure = self._failures.recorded() or self._failures.missing()
            if failure is not None and not self._leaving.wait(LEAVE_SECONDS):
                self._end(failure)

    def _restarted(self) -> Failure | None:
        """The failure of a process whose run was started again; none where its folder was removed."""
        if not self.rank_file.path.exists():
            return None
        return Failure(
            self.rank_file.rank, f"{rank_name(self.rank_file.content())}: its run was started again while it hung"
        )

    def _end(self, failure: Failure) -> NoReturn:
        """End this process, whose training waits in vain or hangs, from the thread."""
        error = failure.error()
        with contextlib.suppress(OSError):
            self._open_log()
            logger.error(f"{error}\nended at {self.status.description}, here:")
            with open(self.log.path, "a") as file:
                faulthandler.dump_traceback(file)
        if self.rank_file.rank == 0 or not error.shared:
            prefix = f"[process {self.rank_file.rank}] " if self.rank_file.rank else ""
            print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _open_log(self) -> None:
        self.log.open(rank_name(self.rank_file.content()))

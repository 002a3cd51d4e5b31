"""RUN/logs/rank-N.log: warnings and errors of process N, and where it was at them; the first process has train.log."""

import contextlib
import logging
from pathlib import Path

from dist_vpt.distributed.rank_status import logger


class RankLog:
    """While open, sends logging records and warnings to the log file of this process."""

    def __init__(self, path: Path, *, captures_all: bool):
        self.path = path
        self.captures_all = captures_all  # warnings of all packages too
        self._handler: logging.Handler | None = None

    def open(self, heading: str) -> None:
        """Does nothing where it is open."""
        if self._handler is not None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            self._handler = logging.FileHandler(self.path, delay=True)
            self._handler.addFilter(_EachWarningOnce())
            self._handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False  # or it would be on the terminal too
            if self.captures_all:
                logging.getLogger().addHandler(self._handler)
                logging.captureWarnings(True)
                logger.info(heading)

    def close(self) -> None:
        """Does nothing where it is closed."""
        if self._handler is None:
            return
        if self.captures_all:
            logging.captureWarnings(False)
        for target in (logging.getLogger(), logger):
            target.removeHandler(self._handler)
        self._handler.close()
        self._handler = None


class _EachWarningOnce(logging.Filter):
    """Some warnings come with every step."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message, warns = record.getMessage(), record.levelno == logging.WARNING
        new = message not in self.logged
        if warns:
            self.logged.add(message)
        return new or not warns

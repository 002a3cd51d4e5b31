"""RUN/logs/rank-N.log: warnings and errors of process N, and where it was at them; the first process has train.log."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from dist_vpt.distributed.rank_status import logger

# Loggers whose messages say nothing that a user of this package could act on, but for their errors.
CHATTER = ("DeepSpeed", "torch.utils.cpp_extension")


class _HeldMessages(logging.Filter):
    """Keeps messages below errors from the terminal: for the log of the process, once that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.target: logging.Handler | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        if self.target is not None:
            self.target.handle(record)
        else:
            self.records.append(record)
        return False

    def send_to(self, target: logging.Handler | None) -> None:
        """Send what is held and what comes to a handler; None: hold it."""
        self.target = target
        if target is not None:
            for record in self.records:
                target.handle(record)
            self.records.clear()


held_messages = _HeldMessages()


def quiet_libraries() -> None:
    """From now on messages of DeepSpeed and torch's builder go to the log of this process, not to the terminal."""
    for name in CHATTER:
        logging.getLogger(name).addFilter(held_messages)
    # The recipe gives the number of workers; on few cores more of them than cores are slower, and no fault.
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    # Of a notebook without ipywidgets, in which whatever imports tqdm says so.
    warnings.filterwarnings("ignore", message="IProgress not found")
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


@contextlib.contextmanager
def prints_as_messages(name: str) -> Iterator[None]:
    """Make what a library prints messages of its logger, which ``quiet_libraries`` sends to the log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:  # also what it said before it failed
        for line in printed.getvalue().splitlines():
            if line.strip():
                logging.getLogger(name).warning(line)  # DeepSpeed's logger drops what is less


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
            held_messages.send_to(self._handler)
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
        held_messages.send_to(None)
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

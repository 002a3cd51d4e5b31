"""Where this process stands, and what the others report of themselves."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger("dist_vpt")  # to the process's own log, unless that is train.log


@dataclass
class RankStatus:
    """Where this process stands: told by what it does, read by the thread."""

    place: str = "the start"
    doing: str = "starting"
    meetings: int = 0  # sums over all processes so far: as many on all that keep pace
    waiting: bool = False  # in such a sum
    limited: bool = False  # whether staying here for run.timeout_minutes means that something hangs
    since: float = 0.0  # monotonic seconds
    progress: dict[str, float] = field(default_factory=dict)  # of the run, on its first process

    def at(self, place: str, doing: str, *, limited: bool = False) -> None:
        """This process goes on to something else."""
        self.place, self.doing, self.limited, self.since = place, doing, limited, time.monotonic()

    @property
    def what(self) -> str:
        """As people say it."""
        return f"{self.place}: {'waiting for the others' if self.waiting else self.doing}"

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """A sum over all processes."""
        self.waiting, self.since = True, time.monotonic()
        try:
            yield
        finally:
            self.waiting, self.since = False, time.monotonic()
            self.meetings += 1


phase = RankStatus()


def read_rank_status(folder: Path, rank: int) -> dict[str, Any]:
    """What a process told last of where it stands; nothing where it has told nothing yet."""
    try:
        content = json.loads((folder / "ranks" / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

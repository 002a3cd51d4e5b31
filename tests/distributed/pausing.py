"""``dist-vpt`` that waits at one moment of a run until it gets the signal that a test sends: a program, run by tests.

python -m tests.distributed.pausing MOMENT MARKER ARGUMENT...
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def pause_at(moment: str, marker: Path) -> None:
    """Have this process write ``marker`` and wait at ``moment``: start, step, val, test or save."""
    from dist_vpt.data.loaders import EvalBatches, TrainBatches
    from dist_vpt.distributed.launch_env import LaunchEnv
    from dist_vpt.distributed.signals import StopSignal
    from dist_vpt.training.checkpointing import States

    epoch, score, resume, save = TrainBatches.epoch, EvalBatches.__iter__, States.resume, States.save

    def wait() -> None:
        marker.with_name(f"{marker.name}-{LaunchEnv.current().rank}").touch()
        deadline = time.monotonic() + 120
        while not StopSignal.entered[-1].requested and time.monotonic() < deadline:
            time.sleep(0.01)
        if moment == "forever":
            time.sleep(120)

    def steps(self: TrainBatches, number: int, start: int = 0) -> Iterator[Any]:
        for step, batches in enumerate(epoch(self, number, start), start=start):
            if moment in ("step", "forever") and (number, step) == (1, 2):
                wait()
            yield batches

    def batches(self: EvalBatches) -> Iterator[Any]:
        for number, batch in enumerate(score(self)):
            if number == 1 and self.split == moment:
                wait()
            yield batch

    def resumed(self: States, *arguments: Any) -> Any:
        if moment == "start":
            wait()
        return resume(self, *arguments)

    def saved(self: States, *arguments: Any) -> Any:
        if moment == "save":
            wait()
        return save(self, *arguments)

    TrainBatches.epoch, EvalBatches.__iter__ = steps, batches  # type: ignore[method-assign]
    States.resume, States.save = resumed, saved  # type: ignore[method-assign]


if __name__ == "__main__":
    from dist_vpt.cli.main import main

    pause_at(sys.argv[1], Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))

"""What all processes decide together: to stop on a signal, and to fail with the error that one of them met."""

import signal
import socket
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.ranks import HERE
from dist_vpt.runfolder import room_for
from dist_vpt.signals import STOP, unheard


class StopSignal:
    """SIGTERM and SIGUSR1 ask for a stop; it is made where all processes have agreed on it.

    One that is entered within another learns of what the outer one was asked, and hands on what it was asked itself.
    """

    entered: ClassVar[list["StopSignal"]] = []

    def __init__(self) -> None:
        self.asked = False  # of this process
        self.agreed = False  # by all of them

    def __enter__(self) -> "StopSignal":
        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        with unheard():
            resource_tracker.ensure_running()  # now: it would be started by any package, later
        self.previous = {s: signal.signal(s, ask) for s in STOP}
        self.asked |= any(outer.asked for outer in self.entered)
        self.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.entered.remove(self)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.asked and self.entered:
            self.entered[-1].asked = True


def total(accelerator: Accelerator, *numbers: float | torch.Tensor) -> list[float]:
    """Sums over all processes. A collective call."""
    numbers_on_device = [torch.as_tensor(number, dtype=torch.float32, device=accelerator.device) for number in numbers]
    with HERE.meeting():
        return accelerator.reduce(torch.stack(numbers_on_device), "sum").tolist()


def agree(accelerator: Accelerator, error: UserError | None, stop: StopSignal | None = None) -> None:
    """Go on only if no process met an error; else raise it on all of them. A collective call."""
    failed, stopped = total(accelerator, error is not None, stop is not None and stop.asked)
    if failed:
        fail_together(accelerator, error)
    if stop is not None:
        stop.agreed = stopped > 0


def stop_together(accelerator: Accelerator, told: str) -> NoReturn:
    """Raise Interrupted where all processes have agreed on a stop."""
    stopped = Interrupted(told)
    stopped.shared = accelerator.num_processes > 1  # one process's telling is enough
    raise stopped


def on_main(accelerator: Accelerator, write: Callable[[], Any], what: str, folder: Path, then: str) -> None:
    """Let main write into a folder, or fail on all processes where the disk is full. A collective call."""
    failed = None
    if accelerator.is_main_process:
        try:
            with room_for(what, folder, then):
                write()
        except RunFailed as error:
            failed = error
    agree(accelerator, failed)


def fail_together(accelerator: Accelerator, error: UserError | None) -> NoReturn:
    """Raise the first process's error on every process, with its place unless it is main. A collective call."""
    if accelerator.num_processes > 1:
        met = gather_object([(error, socket.gethostname())])
        rank, error, host = next((r, e, host) for r, (e, host) in enumerate(met) if e is not None)
        if rank:
            error.args = (f"process {rank} on {host}: {error}",)
    assert error is not None
    error.shared = True  # one process's telling is enough
    raise error

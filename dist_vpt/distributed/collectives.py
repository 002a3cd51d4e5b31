"""What all processes decide together: to stop on a signal, and to fail with the error that one of them met."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dist_vpt.distributed.rank_status import phase
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.files import raising_disk_full


def all_reduce_sum(accelerator: Accelerator, *numbers: float | torch.Tensor) -> list[float]:
    """Sums over all processes. A collective call."""
    numbers_on_device = [torch.as_tensor(number, dtype=torch.float32, device=accelerator.device) for number in numbers]
    with phase.meeting():
        return accelerator.reduce(torch.stack(numbers_on_device), "sum").tolist()


def raise_on_any_rank(accelerator: Accelerator, error: UserError | None, stop: StopSignal | None = None) -> None:
    """Go on only if no process met an error; else raise it on all of them. A collective call."""
    failed, stopped = all_reduce_sum(accelerator, error is not None, stop is not None and stop.asked)
    if failed:
        raise_on_all_ranks(accelerator, error)
    if stop is not None:
        stop.agreed = stopped > 0


def stop_all_ranks(accelerator: Accelerator, told: str) -> NoReturn:
    """Raise Interrupted where all processes have agreed on a stop."""
    stopped = Interrupted(told)
    stopped.shared = accelerator.num_processes > 1  # one process's telling is enough
    raise stopped


def on_main_process(accelerator: Accelerator, write: Callable[[], Any], what: str, folder: Path, then: str) -> None:
    """Let main write into a folder, or fail on all processes where the disk is full. A collective call."""
    failed = None
    if accelerator.is_main_process:
        try:
            with raising_disk_full(what, folder, then):
                write()
        except RunFailed as error:
            failed = error
    raise_on_any_rank(accelerator, failed)


def raise_on_all_ranks(accelerator: Accelerator, error: UserError | None) -> NoReturn:
    """Raise the first process's error on every process, with its place unless it is main. A collective call."""
    if accelerator.num_processes > 1:
        met = gather_object([(error, socket.gethostname())])
        rank, error, host = next((r, e, host) for r, (e, host) in enumerate(met) if e is not None)
        if rank:
            error.args = (f"process {rank} on {host}: {error}",)
    assert error is not None
    error.shared = True  # one process's telling is enough
    raise error

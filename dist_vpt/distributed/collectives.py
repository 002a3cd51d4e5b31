"""Collective calls: sums, and errors and stops that all processes of a run raise together."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.files import raising_disk_full


class RankAccelerator(Accelerator):
    """Accelerate's Accelerator, with how this process was launched and the status that it reports to the others."""

    def __init__(self, launch: LaunchEnv | None = None, status: RankStatus | None = None, **settings: Any):
        super().__init__(**settings)
        self.launch, self.status = launch or LaunchEnv(), status or RankStatus()


def all_reduce_sum(accelerator: RankAccelerator, *numbers: float | torch.Tensor) -> list[float]:
    """Sums over all processes. A collective call."""
    numbers_on_device = [torch.as_tensor(number, dtype=torch.float32, device=accelerator.device) for number in numbers]
    with accelerator.status.in_collective():
        return accelerator.reduce(torch.stack(numbers_on_device), "sum").tolist()


def raise_on_any_rank(accelerator: RankAccelerator, error: UserError | None, stop: StopSignal | None = None) -> None:
    """Raise the first process's error on all processes, if any has one; agree on a stop. A collective call."""
    if stop is not None and isinstance(error, Interrupted):  # this process was stopped while it waited for images
        stop.requested, error = True, None
    failed, stopped = float(error is not None), float(stop is not None and stop.requested)
    if accelerator.num_processes > 1:  # else nothing is to be read from a device
        failed, stopped = all_reduce_sum(accelerator, failed, stopped)
    if failed:
        raise_on_all_ranks(accelerator, error)
    if stop is not None:
        stop.agreed = stopped > 0


def stop_all_ranks(accelerator: RankAccelerator, message: str) -> NoReturn:
    """Raise Interrupted where all processes have agreed on a stop."""
    stopped = Interrupted(message)
    stopped.shared = accelerator.num_processes > 1
    raise stopped


def on_main_process(accelerator: RankAccelerator, write: Callable[[], Any], what: str, folder: Path, then: str) -> None:
    """Have the main process write into a folder. A collective call; all raise RunFailed where the disk is full."""
    failed = None
    if accelerator.is_main_process:
        try:
            with raising_disk_full(what, folder, then):
                write()
        except RunFailed as error:
            failed = error
    raise_on_any_rank(accelerator, failed)


def raise_on_all_ranks(accelerator: RankAccelerator, error: UserError | None) -> NoReturn:
    """Raise the first process's error on every process, naming that process unless it is main. A collective call."""
    if accelerator.num_processes > 1:
        errors = gather_object([(error, socket.gethostname())])
        rank, error, host = next((rank, found, host) for rank, (found, host) in enumerate(errors) if found is not None)
        if rank:
            error.args = (f"process {rank} on {host}: {error}",)
    assert error is not None
    error.shared = True
    raise error

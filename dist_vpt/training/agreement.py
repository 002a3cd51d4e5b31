"""Errors and stop requests of processes that share batches, of which all learn at the same step.

They are summed over the processes with the weight of a step's batch. Whoever reads the sum at once leaves a GPU without
work until the step reaches it. There it is read with the step's numbers, when the next step has been issued. Until
then, a process that could not read its images takes part with others that have no weight; nothing of these steps is
saved, since whatever is saved is read before.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.utils._pytree import tree_map

from dist_vpt.data.loaders import PADDING, Batch
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_all_ranks
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted, UserError

FLAGS = ("failed", "stopped")  # processes: that could not read their images, and that got a stop request


@dataclass
class Agreement:
    """Of the processes of a training."""

    error: UserError | None = None  # of this process, until all know of it
    flags: Tensor | None = None  # FLAGS of the step that was issued last, [2] on the device, where they are read late
    _like: list[Batch] | None = None  # shapes of a step's micro-batches

    @property
    def numbers(self) -> dict[str, Tensor]:
        """The flags by name, or none."""
        return {} if self.flags is None else dict(zip(FLAGS, self.flags, strict=True))

    def is_late(self, accelerator: RankAccelerator) -> bool:
        """Whether the flags of the next step are read after it has been issued: all but those of the first one."""
        return self._like is not None and reads_late(accelerator)

    def batches(self, accelerator: RankAccelerator, fetched: list[Batch] | UserError) -> list[Batch]:
        """This process's micro-batches; in place of an error none, or late images of no weight, of shapes of before."""
        if not isinstance(fetched, UserError):
            if reads_late(accelerator):
                self._like = tree_map(lambda tensor: torch.empty_like(tensor, device="meta"), fetched)
            return fetched
        self.error = fetched
        empty = tree_map(lambda tensor: torch.zeros_like(tensor, device="cpu"), self._like or [])
        return [cast(Batch, {**batch, "index": torch.full_like(batch["index"], PADDING)}) for batch in empty]

    def reached(self, accelerator: RankAccelerator, stop: StopSignal, failed: float, stopped: float) -> None:
        """Act on the flags of a step: raise a process's error on all, note a stop. A collective call."""
        if failed:
            raise_on_all_ranks(accelerator, self.error)
        stop.agreed = stopped > 0


def next_or_error(batches: Iterator[Any]) -> Any:
    """The next batch, or as a value the error or the stop that all processes are to raise."""
    try:
        return next(batches)
    except (DataError, Interrupted) as error:
        return error


def reads_late(accelerator: RankAccelerator) -> bool:
    """Whether reading a step's flags at once would keep a GPU waiting: DeepSpeed's steps are read at once anyway."""
    several = accelerator.num_processes > 1 and accelerator.distributed_type != DistributedType.DEEPSPEED
    return several and accelerator.device.type == "cuda"

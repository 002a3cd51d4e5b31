"""Saving and resuming by all processes of a run: tensors are gathered, process 0 writes, all processes read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor

from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.limits import file_size_advice
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.methods.base import Method
from dist_vpt.runs.adapters import collect, restore, write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.runs.state import newest_whole_state, read_state, restore_best, step_of, write_state
from dist_vpt.training.accelerator import strategy_name
from dist_vpt.training.averaging import WeightAverage
from dist_vpt.training.optimizer_state import gather_optimizer_state, set_optimizer_state


class States:
    """The states of one run."""

    def __init__(self, folder: RunFolder, accelerator: RankAccelerator):
        self.folder, self.accelerator = folder, accelerator
        self.last: int | None = None  # step of the newest state
        self._best: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None  # not on disk yet

    @property
    def newest(self) -> str:
        """Where a resumed run would start."""
        return "from the beginning" if self.last is None else f"from step {self.last}"

    def keep_best(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The best epoch's adapters, to be written with the next state: what is resumed finds those of its state."""
        self._best = (tensors, facts)

    def write_best(self) -> None:
        """Write the best epoch's adapters if they wait for it; to be called on the main process."""
        if self._best is not None:
            write_adapters(self.folder.best, *self._best)
            self._best = None

    def save(  # noqa: PLR0917 (what a state is made of)
        self,
        method: Method,
        optimizer: Any,
        progress: Progress,
        step: int,
        flush: Callable[[], int],
        average: WeightAverage | None = None,
    ) -> str | None:
        """Save at a step boundary; returns why it failed, if it did, such as a full disk. A collective call.

        ``flush`` writes all metrics up to here to the disk, and returns the length of their file.
        """
        accelerator, tensors, failed = self.accelerator, {}, None
        for name, tensor in _training_tensors(method, optimizer, average):  # whole ones on the main process alone
            if accelerator.is_main_process:
                tensors[name] = tensor.detach().cpu().contiguous()
        if accelerator.is_main_process:
            facts = {
                "strategy": strategy_name(accelerator),
                "processes": accelerator.num_processes,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            }
            try:
                progress.metrics_bytes = flush()
                self.write_best()
                write_state(self.folder.state, step, tensors, self.folder.best, facts | asdict(progress))
            except (OSError, SafetensorError) as error:
                failed = "; ".join(filter(None, (str(error), file_size_advice(error))))
        failed = broadcast_object_list([failed])[0]
        self.last = self.last if failed else step
        return failed

    def resume(
        self, method: Method, optimizer: Any, average: WeightAverage | None = None
    ) -> tuple[Progress, list[str]]:
        """Return to the newest whole state, whatever strategy wrote it; with lines for the log. A collective call.

        Raises RunFolderError where there are states and none is whole.
        """
        accelerator = self.accelerator
        found: tuple[Path | None, list[str]] = (None, [])
        refused: UserError | None = None
        if accelerator.is_main_process:
            try:
                found = newest_whole_state(self.folder.state)
            except (OSError, RunFolderError) as error:
                refused = error if isinstance(error, UserError) else RunFolderError(f"{self.folder.state}: {error}")
        raise_on_any_rank(accelerator, refused)
        path, lines = broadcast_object_list([found])[0]  # the main process's: another node may see an older folder
        if path is None:
            return Progress(), lines
        try:
            facts, tensors, progress = read_state(path)
        except RunFolderError as error:
            refused = error
        raise_on_any_rank(accelerator, refused)
        trained, moments = (_below(f"{kind}/", tensors) for kind in ("trained", "optimizer"))
        restore(method, trained, path)
        set_optimizer_state(method, optimizer, trained, moments, accelerator.process_index)
        if average is not None:
            average.load(_below("average/", tensors), accelerator.process_index)
        if accelerator.scaler is not None and facts["scaler"]:
            accelerator.scaler.load_state_dict(facts["scaler"])
        if accelerator.is_main_process:
            restore_best(path, self.folder.best)
        self.last = step_of(path)
        line = f"resumed from {path} at step {self.last}"
        if (facts["strategy"], facts["processes"]) != (strategy_name(accelerator), accelerator.num_processes):
            line += f", saved by {facts['processes']} x {facts['strategy']}"
        return progress, [*lines, line]


def _training_tensors(method: Method, optimizer: Any, average: WeightAverage | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in collect(method).items():
        yield f"trained/{name}", tensor
    for name, tensor in gather_optimizer_state(method, optimizer):
        yield f"optimizer/{name}", tensor
    for name, tensor in average.whole() if average is not None else ():
        yield f"average/{name}", tensor


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

"""Adapters (trained tensors alone) and resume states, written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dist_vpt.errors import RunFolderError, WeightsError
from dist_vpt.methods.base import Method
from dist_vpt.recipe import EarlyStopRecipe
from dist_vpt.runfolder import RunFolder, read_json, write_atomically
from dist_vpt.strategy import strategy

KEPT = 2  # saved states in a run folder


@contextmanager
def gathered(parameters: Iterable[Tensor], *, write: bool = False) -> Iterator[None]:
    """Have whole parameters at hand where ZeRO-3 holds shards; with ``write``, main's values go to all."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def collect(method: Method) -> dict[str, Tensor]:
    """The adapters' tensors, whole and on the CPU. A collective call under ZeRO-3."""
    named = dict(method.adapter_tensors())
    with gathered(named.values()):
        tensors = {
            name: (t.detach().float() if t.is_floating_point() else t).cpu().clone() for name, t in named.items()
        }
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    assert not empty, f"gathered tensors are empty: {empty}"
    return tensors


def restore(method: Method, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy the adapters' tensors into the method, proving that names and shapes are exactly its own.

    Raises WeightsError where they are not, and where an index is not made of whole numbers.
    """
    named = dict(method.adapter_tensors())
    missing, unexpected = sorted(named.keys() - tensors.keys()), sorted(tensors.keys() - named.keys())
    if missing or unexpected:
        raise WeightsError(
            f"{source}: not adapters of this recipe (missing: {missing or 'none'}; unexpected: {unexpected or 'none'})"
        )
    with gathered(named.values(), write=True), torch.no_grad():
        for name, tensor in named.items():
            if tensor.shape != tensors[name].shape:
                raise WeightsError(
                    f"{source}: {name} has shape {tuple(tensors[name].shape)}, this recipe's {tuple(tensor.shape)}"
                )
            if not tensor.is_floating_point() and tensor.dtype != tensors[name].dtype:
                raise WeightsError(f"{source}: {name} is {tensors[name].dtype}, this recipe's {tensor.dtype}")
            tensor.copy_(tensors[name])


def write_adapters(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a .safetensors file of trained tensors with what is needed to use it (recipe, classes) in its head."""
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    write_atomically(path, save(dict(tensors), metadata))


def read_adapters(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained tensors and facts of an adapter file. Raises WeightsError for a missing or damaged one."""
    if not path.is_file():
        raise WeightsError(
            f"{path}: no adapters here; the run has not ended, had no validation split to find a best epoch on, "
            "or this is not a run folder"
        )
    try:
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged adapters ({error}); train again or restore the file") from error


@dataclass
class Progress:
    """Where a run stands: everything but tensors that a resumed run needs to go on as if never stopped.

    Random state needs no keeping: data order, augmentation and dropout are functions of (seed, step, process).
    """

    epoch: int = 0  # the one under way
    step: int = 0  # optimiser steps done in it
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # of this epoch: loss, correct, images
    best: dict[str, Any] = field(default_factory=dict)  # epoch and scores of the best validation
    last: dict[str, Any] = field(default_factory=dict)
    without_rise: int = 0  # evaluations since the last rise by early stopping's min_delta
    to_beat: float = -1.0  # accuracy at that rise
    skipped: list[str] = field(default_factory=list)  # files that could not be read
    metrics_bytes: int = 0  # length of metrics.jsonl
    seconds: float = 0.0  # of training so far, over all sessions
    images: int = 0  # trained on so far
    ended: bool = False  # early stopping ended it

    def count(self, loss: float, correct: float, images: float) -> None:
        """One more step is done: its mean loss and its images, all and those classified rightly."""
        self.step += 1
        self.images += int(images)
        self.sums = [self.sums[0] + loss * images, self.sums[1] + correct, self.sums[2] + images]

    def end_epoch(self) -> dict[str, float]:
        """The epoch under way is over: its loss and accuracy on the training split."""
        loss, correct, images = self.sums
        scores = {"loss": loss / max(images, 1.0), "top1": 100 * correct / max(images, 1.0)}
        self.epoch, self.step, self.sums = self.epoch + 1, 0, [0.0, 0.0, 0.0]
        self.last = {"epoch": self.epoch, "train": scores}  # epochs as people count
        return scores

    def scored(self, scores: dict[str, float], stopping: EarlyStopRecipe | None) -> bool:
        """The epoch that just ended was scored on val: whether it is the best; early stopping is decided here."""
        self.last["val"] = scores
        best = not self.best or scores["top1"] > self.best["val"]["top1"]
        if best:
            self.best = self.last
        if stopping is not None:
            rose = scores["top1"] > self.to_beat + stopping.min_delta
            self.to_beat = scores["top1"] if rose else self.to_beat
            self.without_rise = 0 if rose else self.without_rise + 1
            self.ended = self.without_rise >= stopping.patience
        return best


class States:
    """state/step-N: tensors and progress at a step, the newest two kept.

    A state is written under a hidden name, synchronised, and renamed last: a kill at any moment leaves the states
    before it intact.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator

    def newest(self) -> Path | None:
        """The newest complete state."""
        found = sorted(self.folder.state.glob("step-*/state.json")) if self.folder.state.is_dir() else []
        return found[-1].parent if found else None

    def save(self, model: Any, method: Method, optimizer: Any, progress: Progress, step: int) -> None:
        """Save at a step boundary. A collective call."""
        accelerator, name = self.accelerator, f"step-{step:08d}"
        temporary = self.folder.state / f".{name}.tmp"
        if accelerator.is_main_process:
            for left in self.folder.state.glob(".*.tmp"):  # of a save that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        if accelerator.state.deepspeed_plugin is not None:
            model.save_checkpoint(str(temporary), tag="deepspeed", exclude_frozen_parameters=True)
            tensors = collect(method)
            if accelerator.is_main_process:
                write_adapters(temporary / "trained.safetensors", tensors, {})
        elif accelerator.is_main_process:
            torch.save(
                {
                    "trained": collect(method),
                    "optimizer": optimizer.state_dict(),
                    "scaler": _scaler(accelerator),
                },
                temporary / "tensors.pt",
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.folder.best.exists():
                _link(self.folder.best, temporary / "best.safetensors")
            facts = {
                "strategy": strategy(accelerator),
                "processes": accelerator.num_processes,
                **asdict(progress),
            }
            write_atomically(temporary / "state.json", json.dumps(facts, indent=1) + "\n")
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            shutil.rmtree(self.folder.state / name, ignore_errors=True)
            os.replace(temporary, self.folder.state / name)
            _sync(self.folder.state)
            for old in sorted(self.folder.state.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    def load(self, path: Path, model: Any, method: Method, optimizer: Any) -> Progress:
        """Go back to a saved state. A collective call.

        Raises RunFolderError for a state of another strategy and for a damaged one.
        """
        facts = read_json(path / "state.json")
        saved = (facts.pop("strategy"), facts.pop("processes"))
        here = (strategy(self.accelerator), self.accelerator.num_processes)
        deepspeed = self.accelerator.state.deepspeed_plugin is not None
        # Without DeepSpeed every process holds everything, so that any number of them can go on.
        if saved != here and (deepspeed or saved[0].startswith("zero")):
            raise RunFolderError(
                f"{path}: saved by {saved[1]} processes with {saved[0]}, now {here[1]} with {here[0]}; "
                "DeepSpeed's states are sharded: start again the way it was saved"
            )
        try:
            if deepspeed:
                loaded, _ = model.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)
                if loaded is None:
                    raise OSError("DeepSpeed finds no checkpoint in it")
                # Loaded leniently, since frozen weights are not in it: prove that all the rest came back.
                saved_tensors, _ = read_adapters(path / "trained.safetensors")
                found = collect(method)
                wrong = [name for name in found if not torch.equal(found[name], saved_tensors[name])]
                if wrong:
                    raise OSError(f"after loading, {wrong} differ from what was saved")
            else:
                tensors = torch.load(path / "tensors.pt", map_location="cpu", weights_only=True)
                restore(method, tensors["trained"], path)
                optimizer.load_state_dict(tensors["optimizer"])
                if self.accelerator.scaler is not None and tensors["scaler"]:
                    self.accelerator.scaler.load_state_dict(tensors["scaler"])
        except (OSError, RuntimeError, EOFError, KeyError, ValueError, AssertionError, UnpicklingError) as error:
            raise RunFolderError(
                f"{path}: damaged state ({error}); remove this folder to go on from the one before"
            ) from error
        if self.accelerator.is_main_process and (path / "best.safetensors").exists():
            self.folder.best.unlink(missing_ok=True)
            _link(path / "best.safetensors", self.folder.best)
        try:
            return Progress(**facts)
        except TypeError as error:
            raise RunFolderError(
                f"{path}: saved by another version of dist_vpt ({error}); start the run again"
            ) from error


def _scaler(accelerator: Accelerator) -> dict[str, Any]:
    return accelerator.scaler.state_dict() if accelerator.scaler is not None else {}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

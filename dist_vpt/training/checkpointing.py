"""Adapters (trained tensors alone) and resume states, written whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_vpt.distributed.collectives import raise_on_any_rank
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.files import read_json, sync, write_atomically
from dist_vpt.methods.base import Method
from dist_vpt.runs.adapters import collect, restore, write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.training.accelerator import strategy_name
from dist_vpt.training.optimizer_state import gather_optimizer_state, set_optimizer_state

KEPT = 2  # saved states in a run folder
TENSORS, BEST, MARKER = "tensors.safetensors", "best.safetensors", "state.json"  # of a state


class States:
    """state/step-N: tensors and progress at a step, the newest two kept.

    A state is the same whatever strategy wrote it, and main alone writes it: under a hidden name, synchronised, with
    the sizes and checksums of its files in state.json, and renamed last. A kill or a full disk at any moment leaves the
    states before it intact.
    """

    def __init__(self, folder: RunFolder, accelerator: Accelerator):
        self.folder, self.accelerator = folder, accelerator
        self.last: int | None = None  # step of the newest state
        self.failures = 0  # saves in a row that failed
        self._best: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None  # not on disk yet

    @property
    def newest(self) -> str:
        """Where a resumed run would go on."""
        return "from the beginning" if self.last is None else f"from step {self.last}"

    def keep_best(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The best epoch's adapters, to be written with the next state: what is resumed finds those of its state."""
        self._best = (tensors, facts)

    def write_best(self) -> None:
        """Write the best epoch's adapters if they wait for it; to be called on main."""
        if self._best is not None:
            write_adapters(self.folder.best, *self._best)
            self._best = None

    def save(
        self, method: Method, optimizer: Any, progress: Progress, step: int, flush: Callable[[], int]
    ) -> str | None:
        """Save at a step boundary; why it failed, if it did, such as a full disk. A collective call.

        ``flush`` sees to it that all metrics up to here are on the disk, and gives the length of their file.
        """
        main, tensors = self.accelerator.is_main_process, {}
        for name, tensor in _training_tensors(method, optimizer):  # whole ones on main alone
            if main:
                tensors[name] = tensor.detach().cpu().contiguous()
        failed = None
        if main:
            temporary = self.folder.state / f".step-{step:08d}.tmp"
            try:
                progress.metrics_bytes = flush()
                self._write(temporary, tensors, progress, step)
            except (OSError, SafetensorError) as error:
                failed = str(error)
                shutil.rmtree(temporary, ignore_errors=True)
        failed = broadcast_object_list([failed])[0]
        self.failures = self.failures + 1 if failed else 0
        self.last = self.last if failed else step
        return failed

    def _write(self, temporary: Path, tensors: dict[str, Tensor], progress: Progress, step: int) -> None:
        state, final = self.folder.state, self.folder.state / f"step-{step:08d}"
        self.write_best()
        if final.exists():  # stopped after an epoch's last step, before its end: which a resumed run does again anyway
            return
        for left in state.glob(".*.tmp"):  # of a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / TENSORS)
        if self.folder.best.exists():
            _link(self.folder.best, temporary / BEST)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        scaler = self.accelerator.scaler
        facts = {
            "strategy": strategy_name(self.accelerator),
            "processes": self.accelerator.num_processes,
            "files": files,
            "scaler": scaler.state_dict() if scaler is not None else {},
            **asdict(progress),
        }
        for path in temporary.iterdir():
            sync(path)
        marker = facts | {"sha256": _checksum(facts)}
        write_atomically(temporary / MARKER, json.dumps(marker, indent=1) + "\n")
        sync(temporary)
        os.replace(temporary, final)
        sync(state)
        for old in sorted(state.glob("step-*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self, method: Method, optimizer: Any) -> tuple[Progress, list[str]]:
        """Go back to the newest whole state, whatever wrote it; where that is, in words. A collective call.

        Raises RunFolderError where there are states and none is whole.
        """
        found: tuple[Path | None, list[str]] = (None, [])
        refused: UserError | None = None
        if self.accelerator.is_main_process:
            try:
                found = self._newest_whole()
            except (OSError, RunFolderError) as error:
                refused = error if isinstance(error, UserError) else RunFolderError(f"{self.folder.state}: {error}")
        raise_on_any_rank(self.accelerator, refused)
        path, told = broadcast_object_list([found])[0]  # main's: another node may see an older folder
        if path is None:
            return Progress(), told
        try:
            facts, tensors = read_json(path / MARKER), load_file(path / TENSORS)
        except (OSError, SafetensorError, RunFolderError) as error:
            refused = RunFolderError(
                f"{path}: cannot be read here ({error}); every process needs to see the run folder"
            )
        raise_on_any_rank(self.accelerator, refused)
        trained, moments = (_below(f"{kind}/", tensors) for kind in ("trained", "optimizer"))
        restore(method, trained, path)
        set_optimizer_state(method, optimizer, trained, moments, self.accelerator.process_index)
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.accelerator.is_main_process and (path / BEST).exists():
            self.folder.best.unlink(missing_ok=True)
            _link(path / BEST, self.folder.best)
        self.last = int(path.name.rpartition("-")[2])
        line = f"resumed from {path} at step {self.last}"
        saved = (facts["strategy"], facts["processes"])
        if saved != (strategy_name(self.accelerator), self.accelerator.num_processes):
            line += f", saved by {saved[1]} x {saved[0]}"
        names = {field.name for field in fields(Progress)}
        return Progress(**{name: value for name, value in facts.items() if name in names}), [*told, line]

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The newest whole state, the damaged ones after it set aside, and a warning of each of them."""
        damaged: list[tuple[Path, str]] = []
        for path in sorted(self.folder.state.glob("step-*"), reverse=True):
            reason = _damage(path)
            if reason is None:
                return path, [self._set_aside(*one, path) for one in damaged]
            damaged.append((path, reason))
        if damaged:
            raise RunFolderError(
                f"{self.folder.state}: no state in it is whole: "
                + "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
                + "; restore one of them, or remove this folder to start the run again from its beginning"
            )
        return None, []

    def _set_aside(self, path: Path, reason: str, whole: Path) -> str:
        names = (f"damaged-{path.name}" + (f"-{n}" if n > 1 else "") for n in count(1))
        aside = next(name for name in names if not path.with_name(name).exists())
        os.replace(path, path.with_name(aside))
        return f"warning: {path} is damaged ({reason}): set aside as {aside}; going on from {whole.name} before it"


def _training_tensors(method: Method, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in collect(method).items():
        yield f"trained/{name}", tensor
    for name, tensor in gather_optimizer_state(method, optimizer):
        yield f"optimizer/{name}", tensor


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a saved state, if anything is."""
    try:
        facts = json.loads((path / MARKER).read_text())
        if facts.pop("sha256") != _checksum(facts):
            return f"{MARKER} is not what was written"
        for name, expected in facts["files"].items():
            found = _fingerprint(path / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']:,} bytes, not {expected['bytes']:,}"
            if found != expected:
                return f"{name} is not what was written"
        missing = {field.name for field in fields(Progress)} - facts.keys()
    except OSError as error:
        return str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is not what was written"
    return f"{MARKER} lacks {', '.join(sorted(missing))}" if missing else None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target)

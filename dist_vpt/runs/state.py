"""state/step-N: what a run needs to resume after step N, written, proven and read by one process.

A state is the same whatever strategy wrote it. It is written under a hidden name, synchronized, with the sizes and
checksums of its files in state.json, and renamed last: a kill or a full disk at any moment leaves the states before it
intact.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_vpt.errors import RunFolderError
from dist_vpt.files import read_json, sync, write_atomically
from dist_vpt.runs.progress import Progress

KEPT = 2  # states in a run folder
TENSORS, BEST, MARKER = "tensors.safetensors", "best.safetensors", "state.json"  # of a state


def write_state(folder: Path, step: int, tensors: Mapping[str, Tensor], best: Path, facts: Mapping[str, Any]) -> None:
    """Write the state of a step with the best epoch's adapters, if there are any; only the newest ones stay.

    ``facts``: what resuming needs besides tensors; the run's progress is among them.

    Raises OSError or SafetensorError, with nothing left behind, where the disk is full.
    """
    final = folder / f"step-{step:08d}"
    if final.exists():  # stopped after an epoch's last step, before its end: which a resumed run does again anyway
        return
    for left in folder.glob(".*.tmp"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder / f".{final.name}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_file(dict(tensors), temporary / TENSORS)
        if best.exists():
            _link(best, temporary / BEST)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        for path in temporary.iterdir():
            sync(path)
        content = {**facts, "files": files}
        content["sha256"] = _checksum(content)
        write_atomically(temporary / MARKER, json.dumps(content, indent=1) + "\n")
        sync(temporary)
        os.replace(temporary, final)
        sync(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest_whole_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole state, the damaged ones after it set aside, and a warning of each of them.

    Raises RunFolderError where there are states and none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        reason = _damage(path)
        if reason is None:
            return path, [_set_aside(*one, path) for one in damaged]
        damaged.append((path, reason))
    if damaged:
        raise RunFolderError(
            f"{folder}: no state in it is whole: "
            + "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
            + "; restore one of them, or remove this folder to start the run again from its beginning"
        )
    return None, []


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Progress]:
    """A state's facts, tensors and progress. Raises RunFolderError where it cannot be read."""
    try:
        facts, tensors = read_json(path / MARKER), load_file(path / TENSORS)
    except (OSError, SafetensorError, RunFolderError) as error:
        raise RunFolderError(
            f"{path}: cannot be read here ({error}); every process needs to see the run folder"
        ) from error
    names = {field.name for field in fields(Progress)}
    return facts, tensors, Progress(**{name: value for name, value in facts.items() if name in names})


def restore_best(path: Path, best: Path) -> None:
    """Put the best epoch's adapters, as of a state, back into the run folder."""
    if (path / BEST).exists():
        best.unlink(missing_ok=True)
        _link(path / BEST, best)


def step_of(path: Path) -> int:
    """The step that a state is of."""
    return int(path.name.rpartition("-")[2])


def _set_aside(path: Path, reason: str, whole: Path) -> str:
    names = (f"damaged-{path.name}" + (f"-{n}" if n > 1 else "") for n in count(1))
    aside = next(name for name in names if not path.with_name(name).exists())
    os.replace(path, path.with_name(aside))
    return f"warning: {path} is damaged ({reason}): set aside as {aside}; resuming from {whole.name} before it"


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _checksum(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damage(path: Path) -> str | None:
    """The reason why a state is damaged; None for a valid one."""
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

"""Files of tensors, read by what they hold whatever they are called; no pickle is ever executed."""

import argparse
import json
import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_vpt.backbones.config import require_file
from dist_vpt.errors import WeightsError
from dist_vpt.files import looks_like

TORCH = (b"PK", b"\x80")  # a zip archive, and the pickle of older versions


class _Ignored:
    """In place of numbers of NumPy, which training scripts keep beside tensors: made of a pickle, their types are not
    safe.
    """

    def __init__(self, *_: object): ...

    def __setstate__(self, _: object) -> None: ...


HARMLESS: list[Any] = [argparse.Namespace]  # training arguments: numbers and text
HARMLESS += [(_Ignored, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")]


def read_tensors(path: Path) -> object:
    """The content of a safetensors, NumPy or torch file, or of all files that an index of safetensors lists.

    Raises WeightsError for a missing, damaged or foreign file.
    """
    require_file(path)
    try:
        with open(path, "rb") as opened:
            head = opened.read(256)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    if kind := looks_like(head):
        raise WeightsError(f"{path}: no weights: {kind}")
    try:
        if _is_safetensors(head, path):
            return load_file(path)
        if head.lstrip().startswith(b"{"):
            return _read_index(path)
        if _is_npz(path):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return _read_torch(path)
    except WeightsError:
        raise
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file ({error}); download it again") from error
    except Exception as error:  # torch, pickle, zip and NumPy raise a dozen types for a foreign file
        raise WeightsError(f"{path}: {_reason(error, head)}") from error


def _is_safetensors(head: bytes, path: Path) -> bool:
    """Whether a file starts with the length of a header, and the header; it may be cut off where its name is right."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return True  # asked first: a length of 128 + 256 n starts with the byte that a pickle does
    named = path.suffix == ".safetensors" and not head.lstrip().startswith(b"{")
    return not head.startswith(TORCH) and (head[8:9] == b"{" or named)


def _read_torch(path: Path) -> object:
    with (
        torch.serialization.safe_globals(HARMLESS),
        warnings.catch_warnings(action="ignore"),  # on TorchScript archives, which are refused right after
        open(path, "rb") as opened,  # given a name, torch goes by its ending
    ):
        return torch.load(opened, map_location="cpu", weights_only=True)


def _read_index(path: Path) -> dict[str, Tensor]:
    """All tensors of a model that is stored in several files: an index says which file has which."""
    try:
        files = sorted({Path(name) for name in json.loads(path.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path}: JSON, and not an index of safetensors files; name the weights' file itself"
        ) from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        if name != Path(name.name) or not (path.parent / name).is_file():
            raise WeightsError(f"{path}: lists {name}, and there is no such file beside it; download all its files")
        tensors.update(load_file(path.parent / name))
    return tensors


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(archive.namelist()) and all(name.endswith(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _reason(error: Exception, head: bytes) -> str:
    """What is wrong with a file; torch's own message on a pickle advises to execute it nevertheless."""
    reason = str(error).split("\n")[0] or type(error).__name__
    if head.startswith(b"PK") and (isinstance(error, OSError) or "central directory" in reason):
        return "the file is cut off; download it again"
    if "TorchScript" in reason:
        reason = "a TorchScript archive, which is a program"
    elif isinstance(error, UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"a pickle of {found[1]}" if found else "neither tensors nor text"
    return (
        f"not a file of plain tensors ({reason}). "
        "Pickled objects are never executed: convert the weights to .safetensors on a machine where you trust them"
    )

"""Stream caches in memory-mapped files: built once, under a lock, and verified when they are opened."""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.labels import label_key
from dist_vpt.data.loaders import PADDING, EvalBatches
from dist_vpt.data.splits import Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError
from dist_vpt.files import locked, sync, write_atomically
from dist_vpt.frozen_stream.cache import Array, StreamCache, assemble, layout, stopped, write_rows
from dist_vpt.frozen_stream.observe import StreamSpec, compute_stream

FORMAT = 2  # of the files
CHUNK = 2**26  # bytes per read while files are verified


def identity(
    split: Split, transform: ImageTransform, max_megapixels: float, backbone: Backbone, spec: StreamSpec
) -> dict[str, Any]:
    """The inputs of a cache: backbone, preprocessing, the largest image, the split's images and labels, the dtype."""
    model, images = hashlib.sha256(), hashlib.sha256()
    model.update(repr((backbone, backbone.own_pool.keywords)).encode())
    for module in backbone.modules():  # what their repr leaves out
        model.update(f"{getattr(module, 'num_heads', '')} {getattr(module, 'fused_attn', '')}\n".encode())
    for i in range(len(split)):
        images.update(f"{split.source.identity(i)} {label_key(split.labels, i)}\n".encode(errors="surrogateescape"))
    return {
        "format": FORMAT,
        "model": model.hexdigest(),
        "weights": weights_hash(backbone),
        "transform": transform.shown,
        "max_megapixels": max_megapixels,  # larger images are not in it
        "split": split.name,
        "count": len(split),
        "images": images.hexdigest(),
        "dtype": str(backbone.dtype),
        "blocks": list(spec.blocks),
        "fields": [
            *(field for field in spec.kept if field != "states"),
            *(["pixels in float32"] if spec.pixels else []),
        ],
        **({"states": list(spec.states), "patches_only": spec.patches_only} if spec.states else {}),
        **({"summed": True} if spec.summed else {}),
        **({"kept as": spec.dtype} if spec.dtype != "precision" else {}),
    }


def weights_hash(backbone: Backbone) -> str:
    """SHA-256 of a backbone's tensors as they are held, with their names, dtypes and shapes."""
    weights = hashlib.sha256()
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return weights.hexdigest()


def cache_folder(root: str, facts: dict[str, Any]) -> Path:
    """Where below ``root`` the cache with these facts (``identity``) lies."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    return Path(root).expanduser() / f"{facts['split']}-{key}"


def is_begun(folder: Path) -> bool:
    """Whether a cache is complete or being written; the next build reuses the space of one that was killed."""
    return folder.exists() or _unfinished(folder).exists()


def on_disk(  # noqa: PLR0917 (what is computed, from what, where it is kept)
    folder: Path,
    facts: dict[str, Any],
    backbone: Backbone,
    spec: StreamSpec,
    make_batches: Callable[[int, int], EvalBatches],
    device: torch.device,
    stop: StopSignal,
    *,
    verify: bool = True,
    may_skip: bool = True,
) -> tuple[StreamCache, set[str]]:
    """The stream of a split in memory-mapped files in ``folder``, built by the first process that needs it.

    Returns it with the images that could not be read. ``verify``: read the files whole and compare their checksums.
    Raises DataError where a cache is damaged or stale, where it lacks images and none ``may_skip``, and where a new one
    does not fit; Interrupted after a stop signal while this process builds the cache or waits for another that does.
    """
    wanted = layout(backbone, spec, facts["count"])
    if not folder.exists():  # one that is there is complete, and can be read where nothing can be written
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock, fix = folder.with_suffix(".lock"), "choose another stream.dir"
        # The builder may be another run, which does not see the stop signal of this one.
        with locked(lock, fix, timeout=-1, cancel=lambda: stop.requested) as acquired:
            if not acquired:
                raise stopped()
            os.listdir(folder.parent)  # NFS may answer from its cache: look anew for what another node has built
            if not folder.exists():
                with closing(make_batches(0, 1)) as batches:
                    _build(folder, facts, wanted, backbone, spec, batches, device, stop)
    kept, skipped = _open(folder, facts, wanted, backbone.dtype, spec, verify)
    if skipped and not may_skip:
        raise _lacks_images(folder, skipped)
    return kept, skipped


def _lacks_images(folder: Path, skipped: set[str]) -> DataError:
    """The error for a cache that another run made without some images."""
    first, more = sorted(skipped)[0], len(skipped) - 1
    return DataError(
        f"{folder}: made with data.on_decode_error=skip, this stream cache lacks {first}"
        + (f" and {more} more files" if more else "")
        + " that could not be read; replace what is damaged, or remove this folder if it can be read by now, or set "
        "data.on_decode_error=skip"
    )


def _build(  # noqa: PLR0917 (as on_disk)
    target: Path,
    facts: dict[str, Any],
    wanted: dict[str, Array],
    backbone: Backbone,
    spec: StreamSpec,
    batches: EvalBatches,
    device: torch.device,
    stop: StopSignal,
) -> None:
    temporary = _unfinished(target)
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed: this process holds the lock
    temporary.mkdir()
    try:
        arrays = {name: _mapped(temporary / f"{name}.bin", array, new=True) for name, array in wanted.items()}
        readable_n = np.zeros(facts["count"], bool)
        for batch in batches:
            if stop.requested:  # if this process alone is stopped, another one acquires the lock and builds it
                raise stopped()
            write_rows(arrays, spec, compute_stream(backbone, batch["images"].to(device), spec), batch["index"])
            real_B = batch["index"] != PADDING
            readable_n[batch["index"][real_B].numpy()] = batch["weight"][real_B].numpy() > 0
        del arrays
        for name in wanted:
            sync(temporary / f"{name}.bin")
        content: dict[str, Any] = {
            "facts": facts,
            "checksums": {name: _checksum(temporary / f"{name}.bin") for name in wanted},
            "unreadable": np.flatnonzero(~readable_n).tolist(),
            "skipped": sorted(batches.skipped),
        }
        content["checksum"] = _content_checksum(content)
        write_atomically(temporary / "stream.json", json.dumps(content, indent=1) + "\n")
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, target: Path) -> None:
    """Give a complete cache its name, unless another node has published one that this node did not see yet."""
    try:
        os.replace(temporary, target)
    except OSError:
        if not (target / "stream.json").is_file():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _open(  # noqa: PLR0917 (as on_disk)
    target: Path,
    facts: dict[str, Any],
    wanted: dict[str, Array],
    dtype: torch.dtype,
    spec: StreamSpec,
    verify: bool,
) -> tuple[StreamCache, set[str]]:
    fix = "remove this folder, and it is built anew"
    try:
        content = json.loads((target / "stream.json").read_text())
        stored, intact = content["facts"], content.pop("checksum") == _content_checksum(content)
        changed = [key for key in sorted({*facts, *stored}) if facts.get(key) != stored.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{target}: not a complete stream cache ({reason}); {fix}") from error
    if changed:
        changes = ", ".join(f"{key} {stored.get(key)!r}, now {facts.get(key)!r}" for key in changed)
        raise DataError(f"{target}: stale stream cache, made of something else ({changes}); {fix}")
    if not intact:
        raise DataError(f"{target / 'stream.json'}: damaged stream cache, its content was changed; {fix}")
    for name, array in wanted.items():
        file = target / f"{name}.bin"
        found = file.stat().st_size if file.is_file() else 0
        if found != array.nbytes:
            raise DataError(f"{file}: damaged stream cache, {found} bytes where {array.nbytes} were written; {fix}")
        if verify and _checksum(file) != content["checksums"][name]:
            raise DataError(f"{file}: damaged stream cache, its checksum differs from stream.json's; {fix}")
    arrays = {name: _mapped(target / f"{name}.bin", array, new=False) for name, array in wanted.items()}
    readable_n = np.ones(facts["count"], bool)
    readable_n[content["unreadable"]] = False
    return assemble(arrays, readable_n, spec, dtype), set(content["skipped"])


def _mapped(file: Path, array: Array, *, new: bool) -> Tensor:
    """A file as a tensor: writable while it is built, read-only afterwards (files may be larger than the memory)."""
    if new:
        try:
            with open(file, "wb") as made:
                os.posix_fallocate(
                    made.fileno(), 0, array.nbytes
                )  # a full disk shows here, not as a crash while writing
        except OSError as error:
            raise DataError(
                f"{file}: {array.nbytes / 2**30:.2f} GiB cannot be written there ({error.strerror}); free space there, "
                "choose another stream.dir or set stream.cache=none"
            ) from error
    mapped = np.memmap(file, np.uint8, mode="r+" if new else "r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")  # nothing here writes there
        return torch.from_numpy(mapped).view(array.dtype).view(array.shape)


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as read:
        while chunk := read.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _content_checksum(content: dict[str, Any]) -> int:
    """Of stream.json, without the checksum in it."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")

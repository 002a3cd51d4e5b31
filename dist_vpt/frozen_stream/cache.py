"""The frozen stream of a split, computed once: held in memory, on the accelerator, or in files.

n images of the split, B of a batch, S image side, N tokens, D width, H heads, E = D / H, L blocks that are read.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.config import DataConfig
from dist_vpt.data.loaders import PADDING, Batch, EvalBatches
from dist_vpt.data.splits import Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.collectives import raise_on_any_rank
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted, UserError
from dist_vpt.files import sync, write_atomically
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream

Place = Literal["none", "device", "memory", "disk"]

ROOM = 0.8  # share of the free memory or disk that a cache may take
FORMAT = 2  # of the files
CHUNK = 2**26  # bytes per read while files are checked
POLL_SECONDS = 0.2  # between two looks at a cache that another process builds


@dataclass(frozen=True)
class StreamCache:
    """What the stream holds of all images of a split."""

    kept: StreamOutput  # of n images
    readable_n: np.ndarray  # false for images that were skipped

    def __getitem__(self, index_B: Tensor) -> StreamOutput:
        """The rows of some images, in the order asked for."""
        index_B = index_B.to(self.kept.pooled.device)

        def rows(kept: Tensor) -> Tensor:
            found = kept.index_select(0, index_B)
            return found.pin_memory() if found.device.type == "cpu" and torch.cuda.is_available() else found

        pooled_nD, *blocks = self.kept
        return StreamOutput(rows(pooled_nD), *(tuple(map(rows, each)) for each in blocks))


class CachedBatches:
    """Gives batches out of a cache, where loaders would decode images."""

    def __init__(self, cache: StreamCache, labels_n: np.ndarray, skipped: set[str]):
        self.cache, self.labels_n, self.skipped = cache, labels_n, skipped

    def __call__(self, requests: list[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        for _, index_b in requests:
            real_b = index_b != PADDING
            rows_b = np.where(real_b, index_b, 0).astype(np.int64)
            yield Batch(
                images=self.cache[torch.from_numpy(rows_b)],
                labels=torch.from_numpy(np.where(real_b, self.labels_n[rows_b], 0)),
                weight=torch.from_numpy((real_b & self.cache.readable_n[rows_b]).astype(np.float32)),
                index=torch.from_numpy(index_b.astype(np.int64)),
            )

    def close(self) -> None:
        """Nothing to end."""


def open_streams(  # noqa: PLR0917 (what is read, of which images, by whom)
    recipe: StreamConfig,
    data: DataConfig,
    backbone: Backbone,
    wanted: tuple[StreamSpec, StreamSpec],
    view: ImageTransform,
    sources: Mapping[str, tuple[Split, Callable[[int, int], EvalBatches]]],
    accelerator: Accelerator,
    stop: StopSignal,
    *,
    passes: int,
) -> tuple[dict[str, CachedBatches], str]:
    """Feeds by name for the splits whose stream is kept, and a line that says where, or why not.

    ``wanted``: what is kept in memory or on the accelerator if there is room for it, and what is kept else.
    ``sources``: name -> split, and what gives process (rank, world) its share of the images once. ``passes``: how
    often they are read; a stream that is read once is not kept. A collective call. Raises UserError on all processes
    where the recipe asks for a cache that cannot be, and Interrupted where ``stop`` was asked.
    """
    images = sum(len(split) for split, _ in sources.values())
    asked = StreamConfig(cache="none") if recipe.cache == "auto" and (passes == 1 or not sources) else recipe
    error: UserError | None = None
    place, first, line, feeds = cast(Place, "none"), False, "", {}

    @cache
    def facts(name: str) -> dict[str, Any]:
        return identity(sources[name][0], view, data.max_megapixels, backbone, wanted[1])

    def new() -> int:
        """Bytes of files that are not there and not begun."""
        folders = {name: _folder(recipe, facts(name)) for name in sources}
        images = sum(len(sources[name][0]) for name, folder in folders.items() if not _begun(folder))
        return nbytes(backbone, wanted[1], images)

    needed = (nbytes(backbone, wanted[0], images), nbytes(backbone, wanted[1], images))
    try:
        with _told():
            place, first, line = choose(asked, needed, accelerator.device, new, sharded=_sharded(backbone))
    except UserError as refused:
        error = refused
    raise_on_any_rank(accelerator, error)
    place, first = broadcast_object_list([place, first])  # main's: free memory moves while processes look at it
    reads = wanted[0] if first else wanted[1]
    for name, (split, make_batches) in sources.items() if place != "none" else ():
        try:
            if place == "disk":
                with _told():
                    folder, verify = _folder(recipe, facts(name)), accelerator.is_local_main_process
                    kept, skipped = on_disk(
                        folder, facts(name), backbone, reads, make_batches, accelerator.device, stop, verify=verify
                    )
                    if skipped and data.on_decode_error == "fail":
                        raise DataError(_lacking(folder, skipped))
            else:
                with closing(make_batches(accelerator.process_index, accelerator.num_processes)) as batches:
                    kept = fill(backbone, reads, batches, split, accelerator, place, stop)
                skipped = batches.skipped
            feeds[name] = CachedBatches(kept, split.labels, skipped)
        except UserError as failed:
            error = failed
        raise_on_any_rank(accelerator, error)
    return feeds, line + (f" ({', '.join(feeds)})" if feeds else "")


def shapes(backbone: Backbone, reads: StreamSpec, images: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each array of a cache."""
    found: dict[str, tuple[int, ...]] = {"pooled": (images, backbone.width)}
    for number in reads.blocks:
        heads = backbone.blocks[number].attn.num_heads
        of_heads = (images, heads, backbone.tokens, backbone.width // heads)
        shape: dict[str, tuple[int, ...]] = {
            "normed": (images, backbone.tokens, backbone.width),
            "key_scales": (images, backbone.tokens, heads),
            "keys": of_heads,
            "values": of_heads,
        }
        found |= {_array(field, number): shape[field] for field in reads.fields}
    if reads.pixels:
        found["pixels"] = (images, 3, backbone.image_size, backbone.image_size)
    return found


def _array(field: str, block: int) -> str:
    return f"{field.replace('_', '-')}-{block:02d}"


def nbytes(backbone: Backbone, reads: StreamSpec, images: int) -> int:
    """Size of the frozen stream of some images, bytes."""
    numbers = sum(int(np.prod(shape)) for shape in shapes(backbone, reads, images).values())
    return numbers * backbone.dtype.itemsize


def choose(
    recipe: StreamConfig,
    needed: tuple[int, int],
    device: torch.device,
    new: Callable[[], int],
    *,
    sharded: bool = False,
) -> tuple[Place, bool, str]:
    """Where a stream goes, whether as the first of its two sizes in bytes, and a line that says so with the numbers.

    Files hold the second. ``new``: how many of its bytes stream.dir does not hold yet. ``sharded``: no process can run
    the backbone by itself. Raises UserError where the recipe names a place in which it does not fit.
    """
    if recipe.cache == "none":
        return "none", False, "frozen stream: live, computed for each batch"
    if recipe.cache == "disk" and sharded:
        raise UserError(
            "stream.cache = disk: one process writes the files, and under ZeRO-3 none can run the backbone by itself; "
            "set stream.cache=memory, or start with launch/accelerate/ddp.yaml"
        )
    processes = LaunchEnv.current().local_world_size or 1
    free: dict[Place, tuple[float, str]] = {}
    if device.type == "cuda":
        free["device"] = (torch.cuda.mem_get_info(device)[0] * ROOM, "on the accelerator")
    shared = f" for each of {processes} processes" if processes > 1 else ""
    free["memory"] = (psutil.virtual_memory().available * ROOM / processes, f"in memory{shared}")
    if recipe.dir is not None and not sharded:
        free["disk"] = (shutil.disk_usage(_existing(Path(recipe.dir))).free * ROOM, f"in {recipe.dir}")
    need = f"the frozen stream takes {needed[1] / 2**30:.2f} GiB"
    tried = [f"{room / 2**30:.2f} GiB may be used {where}" for room, where in free.values()]
    if recipe.cache == "auto":
        for place, (room, where) in free.items():
            if needed[1] <= room or (place == "disk" and new() <= room):
                return _kept(place, needed, room, where)
        return "none", False, f"frozen stream: live, since {need} and {'; '.join(tried)}"
    asked: Place = "memory" if recipe.cache == "device" and "device" not in free else recipe.cache
    room, where = free[asked]
    if needed[1] > room and not (asked == "disk" and new() <= room):
        fix = "make room there, choose another stream.dir" if asked == "disk" else "lower data.image_size"
        raise UserError(
            f"stream.cache = {recipe.cache}: {need}, and {room / 2**30:.2f} GiB may be used {where}; {fix}, "
            "set runtime.precision=bf16 or stream.cache=auto"
        )
    return _kept(asked, needed, room, where)


def _kept(place: Place, needed: tuple[int, int], room: float, where: str) -> tuple[Place, bool, str]:
    first = place != "disk" and needed[0] <= room
    return place, first, f"frozen stream: cached {where}, {needed[0 if first else 1] / 2**30:.2f} GiB"


def fill(  # noqa: PLR0917 (what is computed, of what, where it goes)
    backbone: Backbone,
    reads: StreamSpec,
    batches: EvalBatches,
    split: Split,
    accelerator: Accelerator,
    place: Place,
    stop: StopSignal,
) -> StreamCache:
    """Compute the stream of a split and hold it in memory. A collective call: processes share the work.

    Raises a process's DataError on all of them, and Interrupted where ``stop`` was asked.
    """
    device = accelerator.device if place == "device" else torch.device("cpu")
    arrays = {
        name: torch.empty(shape, dtype=backbone.dtype, device=device)
        for name, shape in shapes(backbone, reads, len(split)).items()
    }
    readable_n = np.zeros(len(split), bool)
    unread = iter(batches)
    for _ in range(len(batches)):
        batch = _next(unread, accelerator, stop)
        observed = compute_stream(backbone, batch["images"].to(accelerator.device), reads)
        index_B, weight_B = batch["index"], batch["weight"]
        if accelerator.num_processes > 1:
            observed, index_B, weight_B = accelerator.gather(
                (observed, index_B.to(accelerator.device), weight_B.to(accelerator.device))
            )
        _write(arrays, reads, observed, index_B)
        real_B = (index_B != PADDING).cpu()
        readable_n[index_B.cpu()[real_B].numpy()] = weight_B.cpu()[real_B].numpy() > 0
    return _cache(arrays, readable_n, reads)


def on_disk(  # noqa: PLR0917 (what is computed, of what, where it goes)
    folder: Path,
    facts: dict[str, Any],
    backbone: Backbone,
    reads: StreamSpec,
    make_batches: Callable[[int, int], EvalBatches],
    device: torch.device,
    stop: StopSignal,
    *,
    verify: bool = True,
) -> tuple[StreamCache, set[str]]:
    """The stream of a split in memory-mapped files in ``folder``, built by the first process that needs it.

    Returns it with the files that could not be read. ``verify``: read the files whole and compare their checksums.
    Raises DataError for a cache that is damaged or was made of something else, and where there is no room for a new
    one; Interrupted where ``stop`` was asked of this process while it builds the cache or waits for who does.
    """
    wanted = shapes(backbone, reads, facts["count"])
    if not folder.exists():  # one that is there is whole, and may be read where nothing may be written
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), stop):
            os.listdir(folder.parent)  # NFS may answer from before: what another node has built is looked for anew
            if not folder.exists():
                with closing(make_batches(0, 1)) as batches:
                    _build(folder, facts, wanted, backbone, reads, batches, device, stop)
    return _opened(folder, facts, wanted, backbone.dtype, reads, verify)


def identity(
    split: Split, view: ImageTransform, max_megapixels: float, backbone: Backbone, reads: StreamSpec
) -> dict[str, Any]:
    """What a cache depends on: backbone, preprocessing, the largest image, the split's images and labels, the dtype."""
    model, weights, images = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    model.update(repr((backbone, backbone.own_pool.keywords)).encode())
    for module in backbone.modules():  # what their repr leaves out
        model.update(f"{getattr(module, 'num_heads', '')} {getattr(module, 'fused_attn', '')}\n".encode())
    for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for i in range(len(split)):
        images.update(f"{split.source.identity(i)} {split.labels[i]}\n".encode())
    return {
        "format": FORMAT,
        "model": model.hexdigest(),
        "weights": weights.hexdigest(),
        "view": asdict(view),
        "max_megapixels": max_megapixels,  # larger images are not in it
        "split": split.name,
        "count": len(split),
        "images": images.hexdigest(),
        "dtype": str(backbone.dtype),
        "blocks": list(reads.blocks),
        "fields": [*reads.fields, *(["pixels"] if reads.pixels else [])],
    }


def _lacking(folder: Path, skipped: set[str]) -> str:
    """Of a cache that another run has made."""
    first, more = sorted(skipped)[0], len(skipped) - 1
    return (
        f"{folder}: made with data.on_decode_error=skip, this stream cache lacks {first}"
        + (f" and {more} more files" if more else "")
        + " that could not be read; replace what is damaged, or remove this folder where it can be read by now, or set "
        "data.on_decode_error=skip"
    )


def _next(batches: Iterator[Batch], accelerator: Accelerator, stop: StopSignal) -> Batch:
    """The next batch, or on all processes the error that one of them met or the stop that it was asked for."""
    try:
        batch, error = next(batches), None
    except DataError as failed:
        batch, error = None, failed
    raise_on_any_rank(accelerator, error, stop)
    if stop.agreed:
        raise _stopped()
    assert batch is not None
    return batch


def _write(arrays: dict[str, Tensor], reads: StreamSpec, observed: StreamOutput, index_B: Tensor) -> None:
    real_B = index_B != PADDING

    def put(name: str, rows: Tensor) -> None:
        kept = arrays[name]
        kept[index_B[real_B].to(kept.device)] = rows[real_B.to(rows.device)].to(kept.device)

    put("pooled", observed.pooled)
    for pixels_B3SS in observed.pixels:
        put("pixels", pixels_B3SS)
    for field in reads.fields:
        for number, rows in zip(reads.blocks, getattr(observed, field), strict=True):
            put(_array(field, number), rows)


def _cache(arrays: dict[str, Tensor], readable_n: np.ndarray, reads: StreamSpec) -> StreamCache:
    blocks = {field: tuple(arrays[_array(field, number)] for number in reads.blocks) for field in reads.fields}
    pixels = (arrays["pixels"],) if reads.pixels else ()
    return StreamCache(StreamOutput(arrays["pooled"], **blocks, pixels=pixels), readable_n)


def _build(  # noqa: PLR0917 (as on_disk)
    target: Path,
    facts: dict[str, Any],
    wanted: dict[str, tuple[int, ...]],
    backbone: Backbone,
    reads: StreamSpec,
    batches: EvalBatches,
    device: torch.device,
    stop: StopSignal,
) -> None:
    temporary = _unfinished(target)
    shutil.rmtree(temporary, ignore_errors=True)  # of a build that was killed: we hold the lock
    temporary.mkdir()
    try:
        arrays = {name: _mapped(temporary / f"{name}.bin", wanted[name], backbone.dtype, new=True) for name in wanted}
        readable_n = np.zeros(facts["count"], bool)
        for batch in batches:
            if stop.asked:  # of this process alone, another one takes the lock and builds it
                raise _stopped()
            _write(arrays, reads, compute_stream(backbone, batch["images"].to(device), reads), batch["index"])
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
        content["checksum"] = _own_checksum(content)
        write_atomically(temporary / "stream.json", json.dumps(content, indent=1) + "\n")
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, target: Path) -> None:
    """Give a whole cache its name, unless another node's, seen late, has it already."""
    try:
        os.replace(temporary, target)
    except OSError:
        if not (target / "stream.json").is_file():
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def _opened(  # noqa: PLR0917 (as on_disk)
    target: Path,
    facts: dict[str, Any],
    wanted: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    reads: StreamSpec,
    verify: bool,
) -> tuple[StreamCache, set[str]]:
    remedy = "remove this folder, and it is built anew"
    try:
        content = json.loads((target / "stream.json").read_text())
        stored, whole = content["facts"], content.pop("checksum") == _own_checksum(content)
        changed = [key for key in sorted({*facts, *stored}) if facts.get(key) != stored.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{target}: not a complete stream cache ({reason}); {remedy}") from error
    if changed:
        said = ", ".join(f"{key} {stored.get(key)!r}, now {facts.get(key)!r}" for key in changed)
        raise DataError(f"{target}: stale stream cache, made of something else ({said}); {remedy}")
    if not whole:
        raise DataError(f"{target / 'stream.json'}: damaged stream cache, its content was changed; {remedy}")
    for name, shape in wanted.items():
        file = target / f"{name}.bin"
        size = int(np.prod(shape)) * dtype.itemsize
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            raise DataError(f"{file}: damaged stream cache, {found} bytes where {size} were written; {remedy}")
        if verify and _checksum(file) != content["checksums"][name]:
            raise DataError(f"{file}: damaged stream cache, its checksum differs from stream.json's; {remedy}")
    arrays = {name: _mapped(target / f"{name}.bin", shape, dtype, new=False) for name, shape in wanted.items()}
    readable_n = np.ones(facts["count"], bool)
    readable_n[content["unreadable"]] = False
    return _cache(arrays, readable_n, reads), set(content["skipped"])


def _mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype, *, new: bool) -> Tensor:
    """A file as a tensor: written by a build, and read-only ever after (files may be larger than the memory)."""
    size = int(np.prod(shape)) * dtype.itemsize
    if new:
        try:
            with open(file, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, size)  # a full disk is met here, not as a crash while writing
        except OSError as error:
            raise DataError(
                f"{file}: {size / 2**30:.2f} GiB cannot be written there ({error.strerror}); make room, choose another "
                "stream.dir or set stream.cache=none"
            ) from error
    mapped = np.memmap(file, np.uint8, mode="r+" if new else "r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")  # nothing of ours writes there
        return torch.from_numpy(mapped).view(dtype).view(shape)


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as read:
        while chunk := read.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _own_checksum(content: dict[str, Any]) -> int:
    """Of stream.json, but for the checksum in it."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


@contextmanager
def _locked(path: Path, stop: StopSignal) -> Iterator[None]:
    """Wait for the others that build the same cache, which may be another run's and never hear of this one's stop."""
    with open(path, "a+") as file:
        while not _lock(file):
            if stop.asked:
                raise _stopped()
            time.sleep(POLL_SECONDS)
        yield


def _lock(file: IO[str]) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stopped() -> Interrupted:
    return Interrupted(
        "stopped while the frozen stream was computed; started again (run.resume=auto), the run computes it anew"
    )


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with files as a message for the user."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the stream cache: {error}; mend this file or folder or its rights, or choose another stream.dir"
        ) from error


def _folder(recipe: StreamConfig, facts: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
    return Path(str(recipe.dir)).expanduser() / f"{facts['split']}-{key}"


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tmp")


def _begun(folder: Path) -> bool:
    """Whether a cache is there, or is being written (or was: the next build takes its room)."""
    return folder.exists() or _unfinished(folder).exists()


def _sharded(backbone: Backbone) -> bool:
    """Whether ZeRO-3 spreads the weights over the processes."""
    return any(hasattr(parameter, "ds_id") for parameter in backbone.parameters())


def _existing(path: Path) -> Path:
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())

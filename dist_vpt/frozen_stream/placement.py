"""Where the frozen stream of a run's splits is kept: live, on the accelerator, in memory or in files."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import psutil
import torch
from accelerate.utils import broadcast_object_list

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.config import DataConfig
from dist_vpt.data.loaders import EvalBatches
from dist_vpt.data.splits import Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, UserError
from dist_vpt.frozen_stream.cache import CachedBatches, fill, nbytes
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.frozen_stream.disk import cache_folder, identity, is_begun, on_disk
from dist_vpt.frozen_stream.observe import StreamSpec
from dist_vpt.frozen_stream.timing import measure

T = TypeVar("T")
Location = Literal["none", "device", "memory", "disk"]

BUDGET = 0.8  # share of the free memory or disk that a cache may take


class Placement(NamedTuple):
    """Where a stream is kept, whether as the first of its two specs, and a line for the log with the numbers."""

    location: Location
    first: bool
    line: str


def open_streams(  # noqa: PLR0917 (what is read, of which images, by whom)
    recipe: StreamConfig,
    data: DataConfig,
    backbone: Backbone,
    specs: tuple[StreamSpec, StreamSpec],
    transform: ImageTransform,
    sources: Mapping[str, tuple[Split, Callable[[int, int], EvalBatches]]],
    accelerator: RankAccelerator,
    stop: StopSignal,
    *,
    passes: int,
    step: int,
) -> tuple[dict[str, CachedBatches], str]:
    """Batches by name for the splits whose stream is kept, and a line that reports where, or why not.

    ``specs``: what is kept in memory or on the accelerator if it fits, and what is kept otherwise. ``sources``: name ->
    split, and what makes process (rank, world)'s share of its batches. ``passes``: how often they are read; a stream
    that is read once is not kept. ``step``: bytes that a step needs on its device (``step_bytes``). A collective call.
    Raises UserError on all processes where the recipe asks for an impossible cache, Interrupted after a stop signal.
    """
    images = sum(len(split) for split, _ in sources.values())
    specs = (replace(specs[0], dtype=recipe.dtype), replace(specs[1], dtype=recipe.dtype))
    config = StreamConfig(cache="none") if recipe.cache == "auto" and (passes == 1 or not sources) else recipe

    @cache
    def facts(name: str) -> dict[str, Any]:
        return identity(sources[name][0], transform, data.max_megapixels, backbone, specs[1])

    def missing_bytes() -> int:
        folders = {name: cache_folder(str(recipe.dir), facts(name)) for name in sources}
        images = sum(len(sources[name][0]) for name, folder in folders.items() if not is_begun(folder))
        return nbytes(backbone, specs[1], images)

    def open_cached(name: str, spec: StreamSpec) -> CachedBatches:
        split, make_batches = sources[name]
        if location == "disk":
            checks = {"verify": accelerator.is_local_main_process, "may_skip": data.on_decode_error == "skip"}
            with _naming_stream_dir():
                folder, device = cache_folder(str(recipe.dir), facts(name)), accelerator.device
                kept, skipped = on_disk(folder, facts(name), backbone, spec, make_batches, device, stop, **checks)
            return CachedBatches(kept, split.labels, skipped, device)
        device = accelerator.device if location == "device" else torch.device("cpu")
        return _in_memory(backbone, spec, split, make_batches, accelerator, device, stop)

    def choose_here() -> Placement:
        needed = nbytes(backbone, specs[0], images), nbytes(backbone, specs[1], images)
        sharded = any(hasattr(tensor, "ds_id") for tensor in backbone.parameters())  # by ZeRO-3
        with _naming_stream_dir():
            sharing = Sharing.of(accelerator.launch, step)
            found = choose(config, needed, accelerator.device, missing_bytes, sharing, sharded=sharded)
        if sharded or accelerator.device.type == "cpu" or (config.cache, found.location) != ("auto", "memory"):
            return found
        _, batches = next(iter(sources.values()))
        return _unless_live_is_faster(found, backbone, specs[0 if found.first else 1], batches, accelerator)

    placement = _on_all_ranks(accelerator, choose_here)  # of which the main process's counts: free memory changes
    location, first = broadcast_object_list([placement.location, placement.first])
    each, names = partial(open_cached, spec=specs[0 if first else 1]), sources if location != "none" else ()
    opened = {name: _on_all_ranks(accelerator, partial(each, name)) for name in names}
    return opened, placement.line + (f" ({', '.join(opened)})" if opened else "")


def _in_memory(  # noqa: PLR0917 (as cache.fill)
    backbone: Backbone,
    spec: StreamSpec,
    split: Split,
    make_batches: Callable[[int, int], EvalBatches],
    accelerator: RankAccelerator,
    device: torch.device,
    stop: StopSignal,
) -> CachedBatches:
    with closing(make_batches(accelerator.process_index, accelerator.num_processes)) as batches:
        kept = fill(backbone, spec, batches, split, accelerator, device, stop)
    return CachedBatches(kept, split.labels, batches.skipped, accelerator.device)


def _unless_live_is_faster(
    found: Placement,
    backbone: Backbone,
    spec: StreamSpec,
    make_batches: Callable[[int, int], EvalBatches],
    accelerator: RankAccelerator,
) -> Placement:
    """Host memory, or the live stream where it takes less time; the line gets the measured times."""
    with closing(make_batches(accelerator.process_index, accelerator.num_processes)) as batches:
        speeds = measure(backbone, spec, batches, accelerator.device)
    if speeds.live_is_faster:
        return Placement("none", False, f"frozen stream: live, which is faster than host memory ({speeds})")
    return found._replace(line=f"{found.line} ({speeds})")


def _on_all_ranks(accelerator: RankAccelerator, make: Callable[[], T]) -> T:
    """Call ``make`` on each process; if one fails, raise its UserError on all of them. A collective call."""
    made, error = None, None
    try:
        made = make()
    except UserError as failed:
        error = failed
    raise_on_any_rank(accelerator, error)
    assert made is not None
    return made


class Sharing(NamedTuple):
    """Who else uses the memory of this machine and of this process's GPU."""

    processes: int = 1  # of this machine
    on_gpu: int = 1  # of the GPU
    step: int = 0  # bytes that a process's steps need on the GPU beside the cache

    @classmethod
    def of(cls, launch: LaunchEnv, step: int) -> "Sharing":
        """As this process was launched: GPUs are dealt to the processes of a machine in turn."""
        processes = launch.local_world_size or 1
        on_gpu = launch.processes_per_gpu or -(-processes // max(1, torch.cuda.device_count()))
        return cls(processes, on_gpu, step)


def step_bytes(backbone: Backbone, spec: StreamSpec, batch: int) -> int:
    """What a step needs on its device beside a cache, bytes; an upper bound.

    The rows of two batches (one of them copied ahead) and as much again for their gradients, those that the captures
    of a step and of an epoch's last one work on (step_graph.py), and inside the largest block of a live pass the
    activations of a fused attention and an MLP: 16 widths a token. With a sum, as with what is summed, which leaves as
    much for the reader itself.
    """
    live = batch * backbone.tokens * max(backbone.widths) * 16 * backbone.dtype.itemsize
    return 6 * nbytes(backbone, replace(spec, dtype="precision", summed=False), batch) + live


def choose(
    recipe: StreamConfig,
    needed: tuple[int, int],
    device: torch.device,
    missing_bytes: Callable[[], int],
    sharing: "Sharing | None" = None,
    *,
    sharded: bool = False,
) -> Placement:
    """Where a stream of these two sizes in bytes is kept; files hold the second.

    ``missing_bytes``: how much of the second size stream.dir does not hold yet. ``sharded``: no process can run the
    backbone by itself. Raises UserError where the recipe names a location in which the stream does not fit.
    """
    if recipe.cache == "none":
        return Placement("none", False, "frozen stream: live, computed for each batch")
    if recipe.cache == "disk" and sharded:
        raise UserError(
            "stream.cache = disk: one process writes the files, and under ZeRO-3 none can run the backbone by itself; "
            "set stream.cache=memory, or start with the ddp strategy"
        )
    free = _budgets(recipe, device, sharing or Sharing(), sharded=sharded)
    need = f"the frozen stream takes {needed[1] / 2**30:.2f} GiB"

    def fits(location: Location) -> bool:
        budget, _ = free[location]
        return needed[1] <= budget or (location == "disk" and missing_bytes() <= budget)

    if recipe.cache == "auto":
        found = next(filter(fits, free), None)
        if found is None:
            tried = [f"{budget / 2**30:.2f} GiB may be used {where}" for budget, where in free.values()]
            return Placement("none", False, f"frozen stream: live, since {need} and {'; '.join(tried)}")
    else:
        found = "memory" if recipe.cache == "device" and "device" not in free else recipe.cache
    budget, where = free[found]
    if recipe.cache != "auto" and not fits(found):
        fix = "free space there, choose another stream.dir" if found == "disk" else "lower data.image_size"
        raise UserError(
            f"stream.cache = {recipe.cache}: {need}, and {budget / 2**30:.2f} GiB may be used {where}; {fix}, "
            "set runtime.precision=bf16 or stream.cache=auto"
        )
    first = found != "disk" and needed[0] <= budget
    bits = f" in {recipe.dtype}" if recipe.dtype != "precision" else ""
    return Placement(found, first, f"frozen stream: cached{bits} {where}, {needed[0 if first else 1] / 2**30:.2f} GiB")


def _budgets(
    recipe: StreamConfig, device: torch.device, sharing: Sharing, *, sharded: bool
) -> dict[Location, tuple[float, str]]:
    """Location -> bytes that may be used there, and its name in messages; the fastest first."""
    free: dict[Location, tuple[float, str]] = {}
    if device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] * BUDGET / sharing.on_gpu - sharing.step
        free["device"] = (max(0.0, budget), f"on the accelerator{_each_of(sharing.on_gpu)}")
    budget = psutil.virtual_memory().available * BUDGET / sharing.processes
    free["memory"] = (budget, f"in memory{_each_of(sharing.processes)}")
    if recipe.dir is not None and not sharded:
        path = Path(recipe.dir).expanduser().absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free["disk"] = (shutil.disk_usage(existing).free * BUDGET, f"in {recipe.dir}")
    return free


def _each_of(processes: int) -> str:
    return f" for each of {processes} processes" if processes > 1 else ""


@contextmanager
def _naming_stream_dir() -> Iterator[None]:
    """Raise DataError where files of stream.dir cannot be used."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the stream cache: {error}; fix this file or folder or its permissions, or choose another stream.dir"
        ) from error

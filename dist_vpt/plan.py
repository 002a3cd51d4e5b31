"""``dist-vpt plan``: what a recipe holds on each device, for every policy and strategy, before anything is run.

W processes, one a device.

The bytes are those of footprint.py: exact for one process but for what a kernel takes for itself and what the
device's libraries take; rows of ZeRO are on paper, from DeepSpeed's buffers and the sizes in launch/accelerate.
``measure`` runs the engine's own step and holds the estimate against it.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from dist_vpt.agreement import StopSignal
from dist_vpt.backbones.build import Description, describe
from dist_vpt.build import make_method, make_view
from dist_vpt.checkpoint import Progress
from dist_vpt.data import open_splits
from dist_vpt.data.loaders import PIXELS, Batch
from dist_vpt.data.tasks import resolve
from dist_vpt.engine import Training, train_step
from dist_vpt.errors import RunFailed, UserError
from dist_vpt.footprint import Share, footprint
from dist_vpt.recipe import Recipe
from dist_vpt.runfolder import RunFolder
from dist_vpt.strategy import make_accelerator, prepare, strategy

GIB, MIB = 2**30, 2**20
UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}
# Of a device's memory, what the estimate does not count: fragmentation, and on a GPU its context and libraries.
ROOM = 0.06
CONTEXT = 0.6 * GIB
# The cheapest in time first (benchmarks/policies.py).
POLICIES = ("none", "mlp", "budget-0.5", "every-2", "block")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"  # of a clone


@dataclass(frozen=True)
class Choice:
    """A policy and a strategy with what they cost on each device."""

    policy: str
    strategy: str
    overrides: tuple[str, ...]  # that make the recipe so
    share: Share
    largest: int  # images of a micro-batch that fit; 0: not even one
    scored: int  # images that can be scored at once
    fits: bool


def plan(recipe: Recipe, devices: int, memory: int | None, *, measured: bool = False) -> None:
    """Print the table and a recommendation. Raises RunFailed where nothing fits."""
    console = Console(highlight=False)
    memory = device_memory() if memory is None else memory
    classes = count_classes(recipe)
    micro = micro_batch(recipe, devices)
    found = choices(recipe, classes, devices, memory)
    first = footprint(recipe, classes, micro)
    console.print(
        f"{recipe.backbone.name} + {recipe.method.name}: {first.trained_parameters:,} of {first.parameters:,} "
        f"parameters are trained; {recipe.runtime.precision}; micro-batches of {micro} images on {devices} "
        f"device{'s' if devices > 1 else ''} with {memory / GIB:.1f} GiB"
    )
    console.print(table(found))
    for line in known_speeds(recipe):
        console.print(line)
    if measured:
        console.print(measure(recipe, classes))
    console.print(recommendation(recipe, found, devices, memory))


def check_memory(recipe: Recipe, accelerator: Accelerator, classes: int) -> str:
    """A warning where the estimate says that a run will not fit on its GPU, or "".

    Raises UserError instead where the recipe says so (``runtime.memory_check``).
    """
    if recipe.runtime.memory_check == "ignore" or accelerator.device.type != "cuda":
        return ""
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    processes = accelerator.num_processes
    share = footprint(recipe, classes, micro_batch(recipe, processes)).on(strategy_file(accelerator), processes)
    if share.peak * (1 + ROOM) <= free:  # the context is there already
        return ""
    said = (
        f"this run is estimated to hold {share.peak / GIB:.1f} GiB on a GPU of which {free / GIB:.1f} GiB are free; "
        f"{way_out(recipe, classes, processes, int(free + CONTEXT))}"
    )
    if recipe.runtime.memory_check == "refuse":
        raise UserError(f"{said}; runtime.memory_check=warn tries it all the same")
    return said


def out_of_memory(recipe: Recipe, accelerator: Accelerator, classes: int) -> str:
    """What to do about an out-of-memory error, from the estimates."""
    device, processes = accelerator.device, accelerator.num_processes
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else device_memory()
    return f"out of memory on {device}; {way_out(recipe, classes, processes, memory)}"


def way_out(recipe: Recipe, classes: int, processes: int, memory: int) -> str:
    """The recommendation, or why there is none."""
    try:
        return recommendation(recipe, choices(recipe, classes, processes, memory), processes, memory)
    except RunFailed as error:
        return str(error)


def strategy_file(accelerator: Accelerator) -> str:
    """The file of launch/accelerate that stands for how these processes were started."""
    name = {"single": "ddp", "zero0": "ddp"}.get(strategy(accelerator), strategy(accelerator))
    plugin = accelerator.state.deepspeed_plugin
    told = plugin.deepspeed_config["zero_optimization"] if plugin is not None else {}
    return "zero3_offload" if "offload_param" in told else name


def choices(recipe: Recipe, classes: int, devices: int, memory: int) -> list[Choice]:
    """Every policy under every strategy that the method has, the cheapest in time first."""
    micro = micro_batch(recipe, devices)
    found = []
    for policy, overrides, with_policy in policies(recipe):
        here, half = (footprint(with_policy, classes, images) for images in (micro, max(1, micro // 2)))
        for name in strategies(recipe, devices):
            if name.startswith("zero3") and policy.startswith("budget"):
                continue  # refused (strategy.py)
            share = here.on(name, devices)
            room = int((memory - CONTEXT) / (1 + ROOM)) - share.held
            each = (share.working - half.on(name, devices).working) / max(1, micro - micro // 2)
            largest = micro + math.floor((room - share.working) / each) if micro > 1 else int(room >= share.working)
            scored = recipe.train.eval_batch_size * room // share.scoring
            enough = largest >= micro and scored >= recipe.train.eval_batch_size
            found.append(Choice(policy, name, overrides, share, max(0, largest), max(0, scored), enough))
    return sorted(found, key=lambda choice: strategies(recipe, devices).index(choice.strategy))


def policies(recipe: Recipe) -> Iterator[tuple[str, tuple[str, ...], Recipe]]:
    """Name, overrides and recipe of each memory policy that the method can have."""
    names = ("none",) if recipe.method.reader else POLICIES
    for name in names:
        if recipe.runtime.compile and name.startswith("budget"):
            continue  # refused (recipe.py)
        runtime = recipe.runtime.model_copy(update={"checkpointing": name})
        said = () if name == recipe.runtime.checkpointing else (f"runtime.checkpointing={name}",)
        yield name, said, recipe.model_copy(update={"runtime": runtime})


def strategies(recipe: Recipe, devices: int) -> tuple[str, ...]:
    """The cheapest in time first; ZeRO-3 cannot have methods that read weights inside the blocks."""
    if devices == 1:
        return ("ddp",)
    sharded = () if recipe.method.name == "vqt" else ("zero3", "zero3_offload")
    return ("ddp", "zero1", "zero2", *sharded)


def micro_batch(recipe: Recipe, devices: int) -> int:
    """Images that a process computes at once. Raises UserError where the batch cannot be shared out so."""
    parts = devices * recipe.train.accumulate
    if recipe.train.batch_size % parts:
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {parts} = {devices} devices x "
            f"{recipe.train.accumulate} accumulated micro-batches; mend it or --gpus"
        )
    return recipe.train.batch_size // parts


def table(found: Sequence[Choice]) -> Table:
    """A row a choice, of one device; ``batch`` is the largest micro-batch that fits."""
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("strategy", "policy"):
        shown.add_column(name, no_wrap=True)
    for name in ("weights", "grads", "optimiser", "training", "scoring", "peak", "fits", "batch"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in found:
        share = one.share
        cells = (share.weights, share.gradients, share.optimizer, share.working, share.scoring, share.peak)
        last = ("yes" if one.fits else "no", f"{one.largest:,}" if one.largest else "none")
        shown.add_row(one.strategy, one.policy, *map(_size, cells), *last)
    return shown


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def recommendation(recipe: Recipe, found: Sequence[Choice], devices: int, memory: int) -> str:
    """What to add to the command. Raises RunFailed where nothing fits."""
    batch, accumulate = recipe.train.batch_size // devices, recipe.train.accumulate
    for parts in (n for n in range(accumulate, batch + 1) if batch % n == 0):
        for one in found:
            if one.largest >= batch // parts and one.scored:
                words = list(one.overrides)
                words += [f"train.accumulate={parts}"] if parts != accumulate else []
                few = one.scored < recipe.train.eval_batch_size
                words += [f"train.eval_batch_size={one.scored}"] if few else []
                start = "" if devices == 1 else f"; start with launch/local.sh {one.strategy} {devices}"
                return f"recommended: {' '.join(words) or 'the recipe as it is'}{start}"
    least = min(one.share.held for one in found)
    raise RunFailed(
        f"nothing fits: {memory / GIB:.1f} GiB a device, of which weights and optimiser alone take {least / GIB:.1f} "
        "GiB in the best case; use more or larger devices, a smaller backbone, or fewer prompts"
    )


def device_memory() -> int:
    """Bytes of this machine's accelerator, or of its free host memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().available


def parse_memory(text: str) -> int:
    """Bytes of ``24GiB``, ``80GB``, ``512MiB`` or a plain number of GiB."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"--gpu-memory {text}: must be a size such as 24GiB, 80GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def count_classes(recipe: Recipe) -> int:
    """Of a known task from its row, of others from the data."""
    return resolve(recipe.data).classes or len(open_splits(recipe.data).classes)


def known_speeds(recipe: Recipe) -> Iterator[str]:
    """A line for each benchmark of this method, backbone and precision among the results of a clone."""
    for file in sorted(RESULTS.glob("step-*.json")):
        told = json.loads(file.read_text())
        same = (told["method"], told["backbone"], told["precision"])
        if same == (recipe.method.name, recipe.backbone.name, recipe.runtime.precision):
            yield (
                f"measured: {told['images_per_s']:.3g} images/s with checkpointing {told['checkpointing']}, batch "
                f"{told['batch']} at {told['image_size']} px on {told['device']} ({file.name})"
            )


def measure(recipe: Recipe, classes: int) -> str:
    """A step of the engine on this machine, one process, and the estimate beside it."""
    share = footprint(recipe, classes).on("ddp", 1)
    estimate, found = share.held + share.working, measured_bytes(recipe, classes)  # nothing is scored here
    return (
        f"measured: {_size(found)} at the height of a training step on this machine, estimated {_size(estimate)} "
        f"({100 * (estimate / found - 1):+.1f} %)"
    )


def measured_bytes(recipe: Recipe, classes: int) -> int:
    """The most that the engine's second step held, on one process, by the word of torch's allocators."""
    wants = describe(recipe.backbone)
    training, batches = make_training(recipe, wants, classes), synthetic_batches(recipe, wants, classes)
    train_step(training, batches, norms=True)  # makes the optimiser's state
    device = training.accelerator.device
    if device.type != "cuda":
        return _held(training) + _height_on_cpu(lambda: train_step(training, batches, norms=True))
    torch.cuda.reset_peak_memory_stats(device)
    train_step(training, batches, norms=True)
    return torch.cuda.max_memory_allocated(device)


def _held(training: Training) -> int:
    method, state = training.method, training.optimizer.state.values()
    tensors = [*method.parameters(), *method.buffers(), *(v for s in state for v in s.values() if torch.is_tensor(v))]
    return sum(t.numel() * t.element_size() for t in tensors)


def _height_on_cpu(step: Any) -> int:
    """The most bytes that torch's CPU allocator gave out during ``step``, beyond those at its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = height = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        height = max(height, now)
    return height


def make_training(recipe: Recipe, wants: Description, classes: int) -> Training:
    """What the engine's train step works with; nothing of it writes files or opens data."""
    accelerator = make_accelerator(recipe)
    method, _ = make_method(recipe, wants, classes)
    parameters = {
        "trained": sum(p.numel() for _, p in method.trainable()),
        "total": sum(p.numel() for p in method.parameters()),
    }
    model, optimizer = prepare(recipe, accelerator, method)
    model.train()
    nowhere = cast(Any, None)
    return Training(
        recipe=recipe,
        accelerator=accelerator,
        method=method,
        model=model,
        optimizer=optimizer,
        train=cast(Any, SimpleNamespace(steps_per_epoch=sys.maxsize)),  # all that the step asks of it
        val=None,
        class_weights=torch.ones(classes, device=accelerator.device),
        folder=RunFolder(str(recipe.run.dir)),
        states=nowhere,
        monitor=nowhere,
        facts={},
        progress=Progress(),
        parameters=parameters,
        stop=StopSignal(),  # never entered: signals keep their meaning
    )


def synthetic_batches(recipe: Recipe, wants: Description, classes: int) -> list[Batch]:
    """The micro-batches of one global batch of noise, as loaders give them."""
    noise = torch.Generator().manual_seed(recipe.seed)
    pixels = PIXELS[make_view(recipe.data, wants).dtype]
    size = recipe.data.image_size or wants.image_size
    images = recipe.train.batch_size // recipe.train.accumulate
    return [
        {
            "images": torch.randint(0, 256, (images, 3, size, size), generator=noise).to(pixels),
            "labels": torch.randint(0, classes, (images,), generator=noise),
            "weight": torch.ones(images),
            "index": torch.arange(images),
        }
        for _ in range(recipe.train.accumulate)
    ]

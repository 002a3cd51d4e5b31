"""``dist-vpt plan``: what a recipe holds on each device, for every policy and strategy, before anything is run.

W processes, one a device.

The bytes are those of footprint.py: exact for one process but for what a kernel takes for itself and what the
device's libraries take; rows of ZeRO are on paper, from DeepSpeed's buffers and the sizes in launch/accelerate.
``measure`` runs the engine's own step and holds the estimate against it.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from dist_vpt.backbones.build import Preprocessing, preprocessing_of
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.data.config import resolve
from dist_vpt.data.formats import open_splits
from dist_vpt.data.loaders import PIXELS, Batch
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import OutOfMemory, RunFailed, UserError
from dist_vpt.methods.config import MethodConfig
from dist_vpt.planning.footprint import MemoryEstimate, PerDeviceMemory, footprint, weightless
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.training.accelerator import make_accelerator, prepare, strategy_name, unsupported_reason
from dist_vpt.training.components import build_method, build_transform
from dist_vpt.training.engine import TrainState, train_step

GIB, MIB = 2**30, 2**20
UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}
# Of a device's memory, what the estimate does not count: fragmentation, and on a GPU its context and libraries.
ROOM = 0.06
CONTEXT = int(0.6 * GIB)
# Checkpointing and offload, the cheapest in time first (benchmarks/policies.py; offload has not been timed).
POLICIES = (
    ("none", False),
    ("mlp", False),
    ("every-2", False),
    ("budget-0.5", False),
    ("block", False),
    ("none", True),
    ("block", True),
)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")  # the cheapest in time first
MANY = 4096  # images with which activations are higher than anything that does not grow with them
WIDTH = 108  # of the table
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # of a clone


@dataclass(frozen=True)
class Machines:
    """What a recipe is planned for: a process on each of ``devices`` devices of each of ``nodes`` nodes."""

    memory: int  # bytes of a device
    devices: int = 1
    nodes: int = 1
    gpus: bool = True  # or CPUs

    @property
    def processes(self) -> int:
        return self.devices * self.nodes

    @property
    def reserved(self) -> int:
        """Bytes of a device that are no process's to hold."""
        return CONTEXT if self.gpus else 0

    @property
    def room(self) -> int:
        """Bytes that may be held on a device."""
        return int((self.memory - self.reserved) / (1 + ROOM))


@dataclass(frozen=True)
class Choice:
    """A policy and a strategy with what they cost on each device."""

    policy: str
    strategy: str
    recipe: Recipe  # that has the policy
    overrides: tuple[str, ...]  # that make the recipe so
    share: PerDeviceMemory
    largest: int  # images of a micro-batch that fit; 0: not even one
    scored: int  # images that can be scored at once
    fits: bool


def plan(recipe: Recipe, devices: int, nodes: int, memory: int | None, *, measured: bool = False) -> None:
    """Print the table and a recommendation. Raises RunFailed where nothing fits."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    gpus = recipe.runtime.device != "cpu" and (memory is not None or torch.cuda.is_available())
    machines = Machines(device_memory(gpus) if memory is None else memory, devices, nodes, gpus)
    classes = count_classes(recipe)
    method = weightless(as_counted(recipe, gpus=gpus), classes)
    trained, total = (
        sum(p.numel() for p in each) for each in ([p for _, p in method.trainable()], method.parameters())
    )
    found = choices(recipe, classes, machines)
    console.print(
        f"{recipe.backbone.name} + {recipe.method.name}: {trained:,} of {total:,} parameters are trained; "
        f"{recipe.runtime.precision}; micro-batches of {micro_batch(recipe, machines.processes)} images on "
        f"{machines.processes} device{'s' if machines.processes > 1 else ''} with {told_memory(machines)}"
    )
    console.print(table(found))
    for line in known_speeds(recipe, "cuda" if gpus else "cpu"):
        console.print(line, soft_wrap=True)
    if measured:
        console.print(measure(recipe, classes), soft_wrap=True)
    console.print(recommendation(recipe, classes, found, machines), soft_wrap=True)  # to be pasted


def check_memory(recipe: Recipe, accelerator: Accelerator, classes: int) -> str:
    """A warning where the estimate says that a run will not fit on its GPU, or "".

    Raises UserError instead where the recipe says so (``runtime.memory_check``). A compiled run is never refused: it
    holds less than is counted.
    """
    runtime = recipe.runtime
    if runtime.memory_check == "ignore" or accelerator.device.type != "cuda":
        return ""
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    machines = machines_of(accelerator, free + CONTEXT)  # the context is there already
    images = micro_batch(recipe, machines.processes)
    counted = footprint(as_counted(recipe, gpus=True), classes, images)
    share = counted.on(strategy_file(accelerator), machines.processes)
    if share.peak <= machines.room:
        return ""
    said = (
        f"this run is estimated to hold {share.peak / GIB:.1f} GiB on a GPU of which {free / GIB:.1f} GiB are free; "
        f"{suggestion(recipe, classes, machines)}"
    )
    if runtime.memory_check == "refuse" and not runtime.compile:
        raise UserError(f"{said}; runtime.memory_check=warn tries it all the same")
    return said


@contextmanager
def advice_on_memory(recipe: Recipe, accelerator: Accelerator, trials: int = 1) -> Iterator[None]:
    """Makes of torch's out-of-memory error one that says what to do. ``trials``: so many share the backbone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(out_of_memory(recipe, accelerator, trials)) from error


def out_of_memory(recipe: Recipe, accelerator: Accelerator, trials: int = 1) -> str:
    """What to do about an out-of-memory error, from the estimates, which are of one trial."""
    device = accelerator.device
    if trials > 1:
        return (
            f"out of memory on {device} with {trials} trials in one pass; set stream.cache=memory, a larger "
            "train.grad_accum_steps or a smaller train.eval_batch_size, or train fewer of them"
        )
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else device_memory(False)
    return f"out of memory on {device}; {suggestion(recipe, count_classes(recipe), machines_of(accelerator, memory))}"


def suggestion(recipe: Recipe, classes: int, machines: Machines) -> str:
    """The recommendation, or why there is none."""
    try:
        return recommendation(recipe, classes, choices(recipe, classes, machines), machines)
    except RunFailed as error:
        return str(error)


def machines_of(accelerator: Accelerator, memory: int) -> Machines:
    """Where these processes run, each on a device with ``memory`` bytes."""
    processes = accelerator.num_processes
    devices = min(processes, LaunchEnv.current().local_world_size or processes)
    return Machines(memory, devices, processes // devices, accelerator.device.type == "cuda")


def strategy_file(accelerator: Accelerator) -> str:
    """The file of launch/accelerate that stands for how these processes were started."""
    name = {"single": "ddp", "zero0": "ddp"}.get(strategy_name(accelerator), strategy_name(accelerator))
    plugin = accelerator.state.deepspeed_plugin
    told = plugin.deepspeed_config["zero_optimization"] if plugin is not None else {}
    return "zero3_offload" if "offload_param" in told else name


def choices(recipe: Recipe, classes: int, machines: Machines) -> list[Choice]:
    """Every policy under every strategy that the recipe can have, the cheapest in time first."""
    processes, scored = machines.processes, recipe.train.eval_batch_size
    micro, found = micro_batch(recipe, processes), []
    for policy, overrides, with_policy in policies(recipe, gpus=machines.gpus):
        counted = as_counted(with_policy, gpus=machines.gpus)
        count = cache(partial(_of_images, counted, classes))
        try:
            here = footprint(counted, classes, micro)
        except UserError:  # a policy that is not for this backbone
            if not overrides:
                raise
            continue
        for name in STRATEGIES if processes > 1 else ("ddp",):
            if unsupported_reason(with_policy, name):
                continue
            share = here.on(name, processes)
            room, others = machines.room - share.held, partial(_share, count, name, processes)
            largest = most_images(micro, share, others, room, attrgetter("working"))
            scores = most_images(scored, share, others, room, attrgetter("scoring"))
            fits = share.peak <= machines.room
            found.append(Choice(policy, name, with_policy, overrides, share, largest, scores, fits))
    return sorted(found, key=lambda choice: STRATEGIES.index(choice.strategy))


def _of_images(recipe: Recipe, classes: int, images: int) -> MemoryEstimate:
    """With micro-batches of so many images, as many of which are scored at once."""
    return footprint(_changed(recipe, "train", eval_batch_size=images), classes, images)


def _share(count: Callable[[int], MemoryEstimate], name: str, processes: int, images: int) -> PerDeviceMemory:
    return count(images).on(name, processes)


def most_images(
    images: int,
    share: PerDeviceMemory,
    others: Callable[[int], PerDeviceMemory],
    room: int,
    height: Callable[[PerDeviceMemory], int],
) -> int:
    """The most images that ``room`` bytes are enough for, where ``images`` are as high as ``share`` says.

    Few images may be as high as one: then the optimiser's copies of what is trained are. Many are a straight line.
    """
    many, twice = height(others(MANY)), height(others(2 * MANY))
    found = MANY + (room - many) * MANY // (twice - many)
    if height(share) <= room:
        return max(images, found)
    return max(0, min(found, images - 1)) if height(others(1)) <= room else 0


def policies(recipe: Recipe, *, gpus: bool) -> Iterator[tuple[str, tuple[str, ...], Recipe]]:
    """Name, overrides and recipe of each memory policy that the method can have, the recipe's own among them."""
    runtime = recipe.runtime
    own = (runtime.activation_checkpointing, runtime.offload and gpus)
    pairs = [pair for pair in POLICIES if gpus or not pair[1]]
    if recipe.method.reader:
        pairs = [own]
    elif own not in pairs:
        pairs.insert(1, own)  # where it fits it was chosen for a reason
    for checkpointing, offload in pairs:
        if runtime.compile and checkpointing.startswith("budget"):
            continue  # refused (recipe.py)
        changes = {"activation_checkpointing": checkpointing, "offload": offload}
        said = tuple(
            f"runtime.{key}={str(value).lower()}" for key, value in changes.items() if value != getattr(runtime, key)
        )
        yield checkpointing + " + offload" * offload, said, _changed(recipe, "runtime", **changes)


def as_counted(recipe: Recipe, *, gpus: bool) -> Recipe:
    """The recipe with the kernel to count for a GPU. Footprints are counted on a CPU, which has other kernels and whose
    ``auto`` is another one; what fused kernels keep is the same.
    """
    return _changed(recipe, "runtime", attention="sdpa") if gpus and recipe.runtime.attention != "eager" else recipe


def _changed(recipe: Recipe, section: str, **changes: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=changes)})


def micro_batch(recipe: Recipe, devices: int) -> int:
    """Images that a process computes at once. Raises UserError where the batch cannot be shared out so."""
    parts = devices * recipe.train.grad_accum_steps
    if recipe.train.batch_size % parts:
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {parts} = {devices} devices x "
            f"{recipe.train.grad_accum_steps} accumulated micro-batches; mend it or --gpus"
        )
    return recipe.train.batch_size // parts


def table(found: Sequence[Choice]) -> Table:
    """A row a choice, of one device; ``batch`` is the largest micro-batch that fits."""
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("strategy", "policy"):
        shown.add_column(name, no_wrap=True)
    host = ("host",) if any(one.share.host for one in found) else ()
    for name in ("weights", "grads", "optimiser", "training", "scoring", "peak", *host, "fits", "batch"):
        shown.add_column(name, justify="right", no_wrap=True)
    for one in found:
        share = one.share
        cells = [share.weights, share.gradients, share.optimizer, share.working, share.scoring, share.peak]
        cells += [share.host] if host else []
        last = ("yes" if one.fits else "no", f"{one.largest:,}" if one.largest else "none")
        shown.add_row(one.strategy, one.policy, *map(_size, cells), *last)
    return shown


def _size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def recommendation(recipe: Recipe, classes: int, found: Sequence[Choice], machines: Machines) -> str:
    """What to add to the command. Raises RunFailed where nothing fits."""
    batch, accumulate = recipe.train.batch_size // machines.processes, recipe.train.grad_accum_steps
    for parts in (n for n in range(accumulate, batch + 1) if batch % n == 0):
        for one in found:
            if one.largest >= batch // parts and one.scored:
                scored = min(one.scored, recipe.train.eval_batch_size)
                changed = _changed(one.recipe, "train", accumulate=parts, eval_batch_size=scored)
                # Between micro-batches gradients wait, which the largest micro-batch alone does not tell.
                if parts != accumulate and not fits(changed, classes, one.strategy, machines):
                    continue
                words = list(one.overrides)
                words += [f"train.grad_accum_steps={parts}"] if parts != accumulate else []
                words += [f"train.eval_batch_size={scored}"] if scored != recipe.train.eval_batch_size else []
                return f"recommended: {' '.join(words) or 'the recipe as it is'}{start(one.strategy, machines)}"
    least = min(one.share.held for one in found)
    raise RunFailed(
        f"nothing fits: {told_memory(machines)}, of which weights and optimiser alone take {_size(least)} in the best "
        "case; use more or larger devices, a smaller backbone, or fewer prompts"
    )


def fits(recipe: Recipe, classes: int, strategy: str, machines: Machines) -> bool:
    """Whether the recipe as it is fits, by its own footprint."""
    counted = as_counted(recipe, gpus=machines.gpus)
    images = micro_batch(recipe, machines.processes)
    return footprint(counted, classes, images).on(strategy, machines.processes).peak <= machines.room


def start(strategy: str, machines: Machines) -> str:
    """How to start a recipe on several devices, or ""."""
    if machines.processes == 1:
        return ""
    if machines.nodes == 1:
        return f"; start with launch/local.sh {strategy} {machines.devices}"
    return (
        f"; start with dist-vpt launch slurm ... --nodes {machines.nodes} --gpus-per-node {machines.devices} "
        f"--strategy {strategy}"
    )


def told_memory(machines: Machines) -> str:
    """The memory of a device, and what of it is not counted on."""
    reserved = f"{_size(machines.reserved)} for the GPU's context and libraries and " if machines.reserved else ""
    return f"{machines.memory / GIB:.1f} GiB each ({reserved}{ROOM:.0%} for fragmentation are left free)"


def device_memory(gpus: bool) -> int:
    """Bytes of this machine's GPU, or of its free host memory."""
    if gpus:
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


def known_speeds(recipe: Recipe, device_type: str) -> Iterator[str]:
    """A line for each benchmark of this method with these settings, this architecture and precision on such a device,
    among the results of a clone.
    """
    for file in sorted(RESULTS.glob("step-*.json")):
        told = json.loads(file.read_text())
        try:
            method = TypeAdapter(MethodConfig).validate_python({"name": told["method"], **told["method_settings"]})
        except ValidationError:  # of a version whose methods had other settings
            continue
        same = (method, architecture(told["backbone"]), told["precision"], told["device_type"])
        if same == (recipe.method, architecture(recipe.backbone.name), recipe.runtime.precision, device_type):
            yield (
                f"measured: {told['images_per_s']:.3g} images/s with checkpointing {told['checkpointing']}, batch "
                f"{told['batch']} at {told['image_size']} px on {told['device']} ({file.name})"
            )


def architecture(name: str) -> str:
    """timm's name of a backbone's model, without that of its weights."""
    return ZOO[name].architecture if name in ZOO else name.partition(".")[0]


def measure(recipe: Recipe, classes: int) -> str:
    """A step of the engine on this machine, one process, and the estimate beside it."""
    gpus = recipe.runtime.device != "cpu" and torch.cuda.is_available()
    share = footprint(as_counted(recipe, gpus=gpus), classes).on("ddp", 1)
    estimate, found = share.held + share.working, measured_bytes(recipe, classes)  # nothing is scored here
    return (
        f"measured: {_size(found)} at the height of a training step on this machine, estimated {_size(estimate)} "
        f"({100 * (estimate / found - 1):+.1f} %)"
    )


def measured_bytes(recipe: Recipe, classes: int) -> int:
    """The most that the engine's second step held, on one process, by the word of torch's allocators."""
    wants = preprocessing_of(recipe.backbone)
    training, batches = make_training(recipe, wants, classes), synthetic_batches(recipe, wants, classes)
    train_step(training, batches, norms=True)  # makes the optimiser's state
    device = training.accelerator.device
    if device.type != "cuda":
        return _held(training) + _height_on_cpu(lambda: train_step(training, batches, norms=True))
    torch.cuda.reset_peak_memory_stats(device)
    train_step(training, batches, norms=True)
    return torch.cuda.max_memory_allocated(device)


def _held(training: TrainState) -> int:
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


def make_training(recipe: Recipe, wants: Preprocessing, classes: int) -> TrainState:
    """What the engine's train step works with; nothing of it writes files or opens data."""
    accelerator = make_accelerator(recipe)
    method, _ = build_method(recipe, wants, classes)
    parameters = {
        "trained": sum(p.numel() for _, p in method.trainable()),
        "total": sum(p.numel() for p in method.parameters()),
    }
    model, optimizer = prepare(recipe, accelerator, method)
    model.train()
    nowhere = cast(Any, None)
    return TrainState(
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


def synthetic_batches(recipe: Recipe, wants: Preprocessing, classes: int) -> list[Batch]:
    """The micro-batches of one global batch of noise, as loaders give them."""
    noise = torch.Generator().manual_seed(recipe.seed)
    pixels = PIXELS[build_transform(recipe.data, wants).dtype]
    size = recipe.data.image_size or wants.image_size
    images = recipe.train.batch_size // recipe.train.grad_accum_steps
    return [
        {
            "images": torch.randint(0, 256, (images, 3, size, size), generator=noise).to(pixels),
            "labels": torch.randint(0, classes, (images,), generator=noise),
            "weight": torch.ones(images),
            "index": torch.arange(images),
        }
        for _ in range(recipe.train.grad_accum_steps)
    ]

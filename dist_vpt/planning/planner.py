"""``dist-vpt plan``: the memory of a recipe on each device, for every policy and strategy, before anything runs.

The bytes are those of footprint.py: exact for one process, except for kernels' workspaces and the device's libraries.
Rows of ZeRO are computed, not simulated: from DeepSpeed's buffers and the sizes in launch/accelerate.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.table import Table

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.formats import open_splits
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.errors import OutOfMemory, RunFailed, UserError
from dist_vpt.planning.choices import Choice, as_counted, choices, micro_batch, recommendation
from dist_vpt.planning.footprint import footprint, weightless
from dist_vpt.planning.machines import CONTEXT, GIB, Machines, device_memory, machines_of, size
from dist_vpt.planning.measure import known_speeds, measure
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import strategy_name
from dist_vpt.training.inputs import resolve_inputs

WIDTH = 108  # of the table, in characters
CELLS = {  # fields of PerDeviceMemory -> headings of the table
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "optimizer",
    "working": "training",
    "scoring": "scoring",
    "peak": "peak",
}


def plan(recipe: Recipe, devices: int, nodes: int, memory: int | None, *, measured: bool = False) -> None:
    """Print the table and a recommendation. Raises RunFailed where nothing fits."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    gpus = recipe.runtime.device != "cpu" and (memory is not None or torch.cuda.is_available())
    if gpus and not torch.cuda.is_available() and recipe.runtime.precision == "auto":  # GPUs of elsewhere
        recipe = recipe.changed("runtime", precision="bf16")
        console.print("runtime.precision = auto: counted as bf16; GPUs without units for it (V100, T4) take fp32")
    recipe, _ = resolve_precision(recipe)
    machines = Machines(device_memory(gpus) if memory is None else memory, devices, nodes, gpus)
    classes = count_classes(recipe.data)
    method = weightless(as_counted(recipe, gpus=gpus), resolve_inputs(recipe), classes)
    trained, total = (
        sum(p.numel() for p in each) for each in ([p for _, p in method.trainable()], method.parameters())
    )
    found = choices(recipe, classes, machines)
    console.print(
        f"{recipe.backbone_name} + {recipe.method.name}: {trained:,} of {total:,} parameters are trained; "
        f"{recipe.runtime.precision}; micro-batches of {micro_batch(recipe.train, machines.processes)} images on "
        f"{machines.processes} device{'s' if machines.processes > 1 else ''} with {machines}"
    )
    console.print(table(found))
    for line in known_speeds(recipe, "cuda" if gpus else "cpu"):
        console.print(line, soft_wrap=True)
    if measured:
        console.print(measure(recipe, classes), soft_wrap=True)
    console.print(recommendation(recipe, classes, found, machines), soft_wrap=True)  # to be pasted


def count_classes(data: DataConfig) -> int:
    """Of a known task from its row, of others from the data."""
    return resolve(data).classes or len(open_splits(data).classes)


def table(found: Sequence[Choice]) -> Table:
    """A row for each choice, per device; ``batch`` is the largest micro-batch that fits."""
    shown = Table(box=None, pad_edge=False, collapse_padding=True)
    for name in ("strategy", "policy"):
        shown.add_column(name, no_wrap=True)
    host = ("host",) if any(choice.per_device.host for choice in found) else ()
    for name in (*CELLS.values(), *host, "fits", "batch"):
        shown.add_column(name, justify="right", no_wrap=True)
    for choice in found:
        cells = [getattr(choice.per_device, name) for name in (*CELLS, *host)]
        last = ("yes" if choice.fits else "no", f"{choice.largest:,}" if choice.largest else "none")
        shown.add_row(choice.strategy, choice.policy, *map(size, cells), *last)
    return shown


def check_memory(recipe: Recipe, accelerator: RankAccelerator, classes: int) -> str:
    """A warning where a run is estimated not to fit on its GPU, or "".

    Raises UserError instead with ``runtime.memory_check=refuse``, except for a compiled run, which needs less than the
    estimate.
    """
    runtime = recipe.runtime
    if runtime.memory_check == "ignore" or accelerator.device.type != "cuda":
        return ""
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    machines = machines_of(accelerator, free + CONTEXT)  # the context is allocated already
    images = micro_batch(recipe.train, machines.processes)
    counted = footprint(as_counted(recipe, gpus=True), classes, images, gpus=True)
    per_device = counted.on(strategy_file(accelerator), machines.processes)
    if per_device.peak <= machines.budget:
        return ""
    message = (
        f"this run is estimated to hold {per_device.peak / GIB:.1f} GiB on a GPU of which {free / GIB:.1f} GiB are "
        f"free; {suggestion(recipe, classes, machines)}"
    )
    if runtime.memory_check == "refuse" and not runtime.compile:
        raise UserError(f"{message}; runtime.memory_check=warn tries it nevertheless")
    return message


@contextmanager
def advice_on_memory(recipe: Recipe, accelerator: RankAccelerator, trials: int = 1) -> Iterator[None]:
    """Turns torch's out-of-memory error into one with advice. ``trials``: how many share the backbone."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(out_of_memory(recipe, accelerator, trials)) from error


def out_of_memory(recipe: Recipe, accelerator: RankAccelerator, trials: int = 1) -> str:
    """The message about an out-of-memory error, with a fix from the estimates, which are of one trial."""
    device = accelerator.device
    if trials > 1:
        return (
            f"out of memory on {device} with {trials} trials in one pass; set stream.cache=memory, a larger "
            "train.grad_accum_steps or a smaller train.eval_batch_size, or train fewer of them"
        )
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else device_memory(False)
    return (
        f"out of memory on {device}; {suggestion(recipe, count_classes(recipe.data), machines_of(accelerator, memory))}"
    )


def suggestion(recipe: Recipe, classes: int, machines: Machines) -> str:
    """The recommendation, or why there is none."""
    try:
        return recommendation(recipe, classes, choices(recipe, classes, machines), machines)
    except RunFailed as error:
        return str(error)


def strategy_file(accelerator: RankAccelerator) -> str:
    """The file in launch/accelerate that corresponds to how these processes were started."""
    name = {"single": "ddp", "zero0": "ddp"}.get(strategy_name(accelerator), strategy_name(accelerator))
    plugin = accelerator.state.deepspeed_plugin
    zero = plugin.deepspeed_config["zero_optimization"] if plugin is not None else {}
    return "zero3_offload" if "offload_param" in zero else name

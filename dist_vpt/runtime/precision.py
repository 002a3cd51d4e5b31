"""What ``runtime.precision: auto`` comes to: bf16 where this machine computes faster in it, else fp32."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_vpt.distributed.caches import cache_folder
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.files import write_atomically

if TYPE_CHECKING:
    from dist_vpt.recipe.schema import Recipe

SPEED_UP = 1.2  # of a matrix product, below which bf16 is not worth its rounding
ROWS, WIDTH, REPEATS = 256, 768, 10  # of the product that is timed: a ViT-B's tokens times a square weight


def resolve_precision(recipe: "Recipe", begun_with: Callable[[], str | None] = lambda: None) -> tuple["Recipe", str]:
    """The recipe with the precision that ``auto`` comes to here, and a line with the reason; "" where it was given.

    ``begun_with``: gives that of the same run or sweep, which may have begun on another machine, or None.
    """
    if recipe.runtime.precision != "auto":
        return recipe, ""
    if (earlier := begun_with()) is not None:
        name, reason = earlier, "as the run began"
    else:
        name, reason = choose_precision(cpu=recipe.runtime.device == "cpu")
    return recipe.changed("runtime", precision=name), f"{name}, {reason}"


def choose_precision(*, cpu: bool) -> tuple[str, str]:
    """The name of the precision that ``auto`` comes to on this machine, and the reason. ``cpu``: on it, at any rate."""
    if not cpu and torch.accelerator.is_available():
        return _of_accelerator(LaunchEnv.current())
    return _of_cpu(speed_up())


def _of_accelerator(launch: LaunchEnv) -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "fp32", "bf16 being chosen on CUDA and CPUs alone"
    # Each process asks its own device, and asking creates a context on the current one.
    select_device("auto", launch)
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"in which {name} computes"
    return "fp32", f"since {name} has no units for bf16"


def _of_cpu(times: float) -> tuple[str, str]:
    name = "bf16" if times >= SPEED_UP else "fp32"
    return name, f"since this CPU multiplies {times:.1f} times as fast in bf16 as in fp32"


def speed_up() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16, measured once and kept for the machine.

    Kept, so that all processes and all runs on a machine choose alike.
    """
    folder = cache_folder()
    file = None if folder is None else folder / "precision.json"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError, AttributeError):  # none yet, or damaged: measured again
        known = dict(json.loads(file.read_text()).items()) if file else {}
    machine = _machine()
    if not isinstance(known.get(machine), int | float):
        known[machine] = round(_measure(), 2)
        with suppress(OSError):
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(known, indent=1) + "\n")
    return known[machine]


def _machine() -> str:
    """The kind of CPU, its instructions and this torch: a home may be shared by machines of many kinds."""
    lines: set[str] = set()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        lines = {line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))}
    kind = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
    return f"{kind} torch {torch.__version__}"


def _measure() -> float:
    """The quotient of the shortest times of a product: others who compute on the machine only lengthen times.

    On one thread: where others have a core, threads wait for each other far longer than they compute.
    """
    noise = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, WIDTH, generator=noise) for rows in (ROWS, WIDTH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(a, b) / _seconds(a.bfloat16(), b.bfloat16())
    finally:
        torch.set_num_threads(threads)


def _seconds(a: Tensor, b: Tensor) -> float:
    torch.nn.functional.linear(a, b)  # the first call prepares
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - started)
    return min(times)

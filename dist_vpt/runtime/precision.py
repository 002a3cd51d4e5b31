"""What ``runtime.precision: auto`` comes to: bf16 where this machine computes faster in it, else fp32."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.runtime.cpu_speed import SPEED_UP, cpu_speed

if TYPE_CHECKING:
    from dist_vpt.recipe.schema import Recipe


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
    return _of_cpu(cpu_speed().bf16_over_fp32)


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

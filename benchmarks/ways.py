"""Times several ways to train in turns, and computes what they cannot beat on a device."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from step import FLOPS, matmul_rate, rounded, synchronize
from torch.utils.flop_counter import FlopCounterMode

from dist_vpt.training.components import DTYPES

WAYS = ("split", "cached", "cached_trials")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of logits, relative; half precision rounds in every block
COPY_BYTES = {"cpu": 2**28}  # elsewhere 2^32
Numbers = dict[str, dict[str, float]]  # by way and precision


@dataclass(frozen=True)
class Way:
    """One way to train in one precision."""

    step: Callable[[], None]  # forward, loss, backward and update of a batch
    divisor: int  # images x trials of a step
    saved: float  # MiB that autograd holds for backward, per image and trial
    reads: int = 0  # bytes of the cache that a step reads


def time_in_turns(ways: dict[str, dict[str, Way]], device: torch.device, repeats: int) -> Numbers:
    """Median seconds per image and trial of each way, which must have taken a first step.

    Each repeat takes one step of every way, so that what else the machine does meets all of them.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {p: [] for p in by} for name, by in ways.items()}
    for _ in range(repeats):
        for name, by_precision in ways.items():
            for precision, way in by_precision.items():
                synchronize(device)
                began = time.perf_counter()
                way.step()
                synchronize(device)
                taken[name][precision].append((time.perf_counter() - began) / way.divisor)
    return {name: {p: statistics.median(times) for p, times in by.items()} for name, by in taken.items()}


def ratios(seconds: Numbers) -> Numbers:
    """How many times faster than the published way in float32, and than the published way in the same precision."""
    published = seconds["published"]
    against_float32 = {
        f"ratio_{name}": {p: rounded(published["fp32"] / value) for p, value in seconds[name].items()} for name in WAYS
    }
    return against_float32 | {
        f"ratio_{name}_same_precision": {p: rounded(published[p] / value) for p, value in seconds[name].items()}
        for name in WAYS
    }


def floor(ways: dict[str, dict[str, Way]], seconds: Numbers, device: torch.device) -> dict[str, Any]:
    """What the cached ways cannot be faster than on this device, and how far they are from it."""
    bandwidth = memory_rate(device)
    rates = {precision: matmul_rate(device, DTYPES[precision]) for precision in ways["cached"]}
    floors: Numbers = {}
    for name in ("cached", "cached_trials"):
        floors[name] = {}
        for precision, way in ways[name].items():
            with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                way.step()
            least = way.reads / bandwidth + counter.get_total_flops() / rates[precision]
            floors[name][precision] = least / way.divisor
    over = {name: {p: seconds[name][p] / least for p, least in by.items()} for name, by in floors.items()}
    return {
        "memory_gb_per_s": rounded(bandwidth / 1e9),
        "matmul_tflops": {precision: rounded(rate / 1e12) for precision, rate in rates.items()},
        "seconds_per_image_and_trial": rounded_numbers(floors),
        "time_over_floor": rounded_numbers(over),
    }


def memory_rate(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second, read and written, of one large copy, the fastest of ``repeats``."""
    source = torch.zeros(COPY_BYTES.get(device.type, 2**32), dtype=torch.uint8, device=device)
    target, fastest = torch.zeros_like(source), math.inf
    for _ in range(1 + repeats):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * source.nbytes / fastest


def rounded_numbers(numbers: Numbers) -> Numbers:
    return {name: {p: rounded(value) for p, value in by.items()} for name, by in numbers.items()}

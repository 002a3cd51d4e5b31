"""How fast this CPU multiplies, measured once and kept for the machine.

Kept, so that all processes and all runs on a machine choose alike.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from dist_vpt.backbones.products import ONEDNN_LINEAR, onednn_product, use_onednn
from dist_vpt.distributed.caches import cache_folder
from dist_vpt.errors import RunFolderError
from dist_vpt.files import locked, write_atomically

ROWS, WIDTH, REPEATS = 256, 768, 10  # of the product that is timed: a ViT-B's tokens times a square weight
LOCK_SECONDS = 60.0  # far longer than a measurement
SPEED_UP = 1.2  # of a matrix product, below which another way to it is not worth its rounding
# Variables that have MKL and oneDNN compute in other ways; what is measured with them is true of them alone.
VARIABLES = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
)


@dataclass(frozen=True)
class CPUSpeed:
    """How many times as fast as torch's float32 products others are."""

    bf16: float
    onednn: float  # in float32

    @property
    def bf16_over_fp32(self) -> float:
        """How many times as fast as in float32, at its fastest, this CPU multiplies in bf16."""
        return self.bf16 / max(self.onednn, 1.0)


def use_faster_products() -> str:
    """Take the faster of torch's own float32 products and oneDNN's; a note for the log, "" for torch's own."""
    times = cpu_speed().onednn
    use_onednn(times >= SPEED_UP)
    return f"by oneDNN, {times:.1f} times as fast here as torch's own" if times >= SPEED_UP else ""


def cpu_speed() -> CPUSpeed:
    """Of this machine."""
    folder = cache_folder()
    if folder is None:
        return _measure()
    file = folder / "cpu_speed.json"
    if (speed := _kept(file).get(_machine())) is not None:
        return speed
    with ExitStack() as stack:
        # Processes that start together would each measure, and might choose differently.
        with suppress(OSError, RunFolderError):  # a folder that cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(file.with_suffix(".lock"), "", timeout=LOCK_SECONDS))
        if (speed := _kept(file).get(_machine())) is not None:
            return speed
        kept = _kept(file) | {_machine(): (speed := _measure())}
        with suppress(OSError):
            write_atomically(file, json.dumps({kind: asdict(each) for kind, each in kept.items()}, indent=1) + "\n")
    return speed


def _kept(file: Path) -> dict[str, CPUSpeed]:
    """The speeds in the file by kind of machine; what is damaged is left out, and measured again."""
    kept = {}
    with suppress(OSError, ValueError, AttributeError):
        for machine, times in json.loads(file.read_text()).items():
            with suppress(TypeError):
                speed = CPUSpeed(**times)
                if all(isinstance(each, int | float) for each in asdict(speed).values()):
                    kept[machine] = speed
    return kept


def _machine() -> str:
    """The kind of CPU, its instructions, VARIABLES and this torch: a home may be shared by machines of many kinds."""
    lines: set[str] = set()
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        names = ("model name", "flags", "CPU implementer", "CPU part", "Features")  # ARM's have no model name
        lines = {line for line in text.splitlines() if line.startswith(names)}
    lines |= {f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ}
    kind = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]
    return f"{kind} torch {torch.__version__}"


def _measure() -> CPUSpeed:
    """Quotients of the shortest times of a product: others who compute on the machine only lengthen times.

    On one thread: where others have a core, threads wait for each other far longer than they compute.
    """
    noise = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, WIDTH, generator=noise) for rows in (ROWS, WIDTH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    products = [partial(F.linear, a, b), partial(F.linear, a.bfloat16(), b.bfloat16())]
    products += [] if ONEDNN_LINEAR is None else [partial(onednn_product, a, b)]
    try:
        own, bf16, *others = _seconds(products)
    finally:
        torch.set_num_threads(threads)
    return CPUSpeed(round(own / bf16, 2), round(own / others[0], 2) if others else 1.0)


def _seconds(products: Sequence[Callable[[], object]]) -> list[float]:
    """The shortest time of each, in turns; their first calls prepare."""
    times = [[_time(product) for product in products] for _ in range(1 + REPEATS)]
    return [min(of_one) for of_one in zip(*times[1:], strict=True)]


def _time(product: Callable[[], object]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started

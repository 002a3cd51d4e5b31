"""Peak memory of this process."""

import contextlib
import gc
import resource
import sys
from pathlib import Path

import torch

from dist_vpt.runtime.allocator import trim_freed_memory

MIB = 2**20
PROC_STATUS = Path("/proc/self/status")


def peak_memory_mib() -> float:
    """The most memory this process has held, in MiB: the GPU's allocations, or the resident set on a CPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / MIB
    if PROC_STATUS.is_file():
        line = next((each for each in PROC_STATUS.read_text().splitlines() if each.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def free_and_reset_peak() -> None:
    """Release the memory of an earlier run of this process, and reset the peak (not on macOS).

    What torch's allocator and malloc cache would count as used in the check whether a run fits.
    """
    gc.collect()
    trim_freed_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

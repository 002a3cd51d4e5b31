"""Whether the memory of a machine is enough for what loaders of its processes keep there."""

import math
import os
from pathlib import Path

import numpy as np
import psutil

from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError

SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20


def check_shared_memory(slot: int, workers: int, slots: int, processes: int) -> None:
    """Raises DataError where the slots of all processes of this machine do not fit into shared memory.

    ``slot``: bytes of one of a process's ``slots``. The system gives memory that is not there, and ends a process with
    a bus error when it writes into it.
    """
    if not SHARED_MEMORY.is_dir():  # not Linux: torch shares memory in another way
        return
    of = os.statvfs(SHARED_MEMORY)
    free, needed = of.f_bavail * of.f_frsize, slots * slot * processes
    if needed <= free:
        return
    fewer = max(0, (free // processes // max(1, slot) - 1) * workers // (slots - 1))
    raise DataError(
        f"data.workers = {workers}: the batches of {processes} process{'es' if processes > 1 else ''} need "
        f"{needed / MIB:,.0f} MiB of shared memory, and {SHARED_MEMORY} has {free / MIB:,.0f} MiB free; set "
        f"data.workers={fewer}, or give the container more (docker run --shm-size=8g, or --ipc=host)"
    )


def check_cache_memory(transform: ImageTransform, images: int, processes: int, *, train: bool, final: bool) -> None:
    """Raises DataError where the host's memory is too small for ``data.cache: memory`` in all processes of a machine.

    ``final``: whether final pixels are kept.
    """
    # Before a random crop the shorter side is known and the longer is not: assume images of 3:2. Before a random crop
    # and a vpt resize no side is known: assume the same.
    final_pixels = math.prod(transform.shape(train)) // 3
    pixels = final_pixels if final else transform.shorter_side**2 * 1.5
    per_pixel = 3 * np.dtype(transform.dtype if final else np.uint8).itemsize
    needed, available = images * pixels * per_pixel * processes, psutil.virtual_memory().available
    if needed > available:
        raise DataError(
            f"data.cache: memory needs {needed / 2**30:.1f} GiB for {images} images of {transform.image_size} px "
            f"on {processes} processes of this machine, and {available / 2**30:.1f} GiB are free; "
            f"set data.cache=none"
        )

"""How this process gives freed host memory back."""

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # workers that load images import this module too, and no model
    pass

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2**20  # bytes from which on a tensor that is freed goes back to the system


def keep_freed_memory() -> bool:
    """Have this process use freed host memory again rather than give it back; whether its malloc can (glibc's).

    By default every large tensor comes from the system as fresh pages, and goes back when it is freed: a step on a CPU
    then pays a page fault for each 4 KiB that it writes, which on a virtual machine can cost as much as its arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))


def give_back_freed_memory() -> bool:
    """Have this process give back host memory as soon as it is freed, and now; whether its malloc can (glibc's).

    Where weights are gathered and freed all the time, freed places are hardly ever of the size that is wanted next: a
    process that shares weights out would grow to the size of one that does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGE) and trim_freed_memory())


def trim_freed_memory() -> bool:
    """Give back the host memory that is free by now, and no other; whether this process's malloc can (glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    return bool(trim)

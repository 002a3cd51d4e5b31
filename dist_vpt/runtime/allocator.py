"""Whether this process keeps freed host memory or returns it to the system."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 2**20  # bytes; a larger tensor is returned to the system when it is freed


def keep_freed_memory() -> bool:
    """Have this process reuse freed host memory rather than return it. False if its malloc cannot (only glibc's can).

    By default every large tensor comes from the system as fresh pages, and goes back when it is freed: a step on a CPU
    then pays a page fault for each 4 KiB that it writes, which on a virtual machine can cost as much as its arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_MAX, 0))


def give_back_freed_memory() -> bool:
    """Have this process return host memory as soon as it is freed, and now. False if malloc cannot (only glibc's can).

    If weights are gathered and freed all the time, freed blocks rarely have the size that is needed next: a process
    that shards weights would grow to the size of one that does not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGE) and trim_freed_memory())


def trim_freed_memory() -> bool:
    """Return the host memory that is free now, and no other. False if the malloc cannot (only glibc's can)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    return bool(trim)

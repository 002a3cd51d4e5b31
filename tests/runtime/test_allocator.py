"""Freed memory is used again: a process that keeps it pays no page faults for the tensors of its next step.

Or it is given back: a process that shares weights out does not go on holding the places of those that it has not.
"""

import subprocess
import sys

import pytest

from dist_vpt.runtime.allocator import give_back_freed_memory, keep_freed_memory, trim_freed_memory

pytestmark = pytest.mark.slow

BYTES = 64 * 2**20  # more than glibc ever keeps by itself

STEPS = f"""
import resource, sys, torch
from dist_vpt.runtime.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return torch.ones({BYTES} // 4).sum()
for _ in range(8):  # until the heap has settled
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

SHARES = f"""
import psutil, sys, torch
from dist_vpt.runtime.allocator import give_back_freed_memory
def held():
    return psutil.Process().memory_info().rss
torch.ones({BYTES} // 12)  # freed: now glibc takes tensors up to this size from its heap
whole = [torch.ones({BYTES} // 16) for _ in range(16)]
before = held()
shares = [tensor[::2].clone() for tensor in whole]
del whole[:]
if sys.argv[1] == "give back":
    assert give_back_freed_memory()
for size in range(8, 16):  # gathered again, each in turn, and freed
    torch.ones({BYTES} // 4 // size)
print(held() - before)
"""
FORGETS = f"""
import psutil, torch
from dist_vpt.runtime.allocator import keep_freed_memory
from dist_vpt.runtime.peak_memory import free_and_reset_peak
def held():
    return psutil.Process().memory_info().rss
assert keep_freed_memory()
torch.ones({BYTES} // 4)
before = held()
stream = [torch.ones({BYTES} // 4) for _ in range(8)]
above = torch.ones(1000)  # so that it is no end of the heap that is freed
del stream
kept = held() - before
free_and_reset_peak()
print(kept, held() - before)
"""
ON_GLIBC = pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")


@ON_GLIBC
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.25 * faults["give back"], faults


@ON_GLIBC
def test_freed_memory_is_given_back() -> None:
    grown = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", SHARES, how], capture_output=True, text=True, check=True)
        grown[how] = int(done.stdout)
    whole = 16 * BYTES // 4
    assert grown["keep"] > 0  # the shares besides
    assert grown["give back"] < -0.35 * whole  # of at most half of it: torch itself has grown, too


@ON_GLIBC
def test_the_next_run_of_a_process_finds_its_memory_free() -> None:
    """Else the seeds of a sweep whose grid has filled the memory would find no room to keep the stream in."""
    done = subprocess.run([sys.executable, "-c", FORGETS], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > 6 * BYTES
    assert left < BYTES


def test_where_malloc_cannot_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False
    assert give_back_freed_memory() is False
    assert trim_freed_memory() is False

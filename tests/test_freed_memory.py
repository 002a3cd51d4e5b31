"""Freed memory is used again: a process that keeps it pays no page faults for the tensors of its next step."""

import subprocess
import sys

import pytest

from dist_vpt.memory import keep_freed_memory

BYTES = 64 * 2**20  # more than glibc ever keeps by itself

STEPS = f"""
import resource, sys, torch
from dist_vpt.memory import keep_freed_memory
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


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_freed_memory_is_used_again() -> None:
    faults = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.25 * faults["give back"], faults


def test_where_malloc_cannot_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert keep_freed_memory() is False

"""The devices that a recipe is planned for, and their memory."""

import re
from dataclasses import dataclass

import psutil
import torch

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.errors import UserError

GIB, MIB = 2**30, 2**20
UNITS = {"": GIB, "gib": GIB, "gb": 10**9, "mib": MIB, "mb": 10**6}
# Part of a device's memory that the estimate does not count: fragmentation, and on a GPU its context and libraries.
FRAGMENTATION = 0.06
CONTEXT = int(0.6 * GIB)


@dataclass(frozen=True)
class Machines:
    """The machines of a plan: one process on each of ``devices`` devices of each of ``nodes`` nodes."""

    memory: int  # bytes of a device
    devices: int = 1
    nodes: int = 1
    gpus: bool = True  # or CPUs

    @property
    def processes(self) -> int:
        return self.devices * self.nodes

    @property
    def reserved(self) -> int:
        """Bytes of a device that no process can allocate."""
        return CONTEXT if self.gpus else 0

    @property
    def budget(self) -> int:
        """Bytes that may be allocated on a device."""
        return int((self.memory - self.reserved) / (1 + FRAGMENTATION))

    def __str__(self) -> str:
        """The memory of a device, and how much of it is left free."""
        reserved = f"{size(self.reserved)} for the GPU's context and libraries and " if self.reserved else ""
        return f"{self.memory / GIB:.1f} GiB each ({reserved}{FRAGMENTATION:.0%} for fragmentation are left free)"


def machines_of(accelerator: RankAccelerator, memory: int) -> Machines:
    """The machines of the running processes, each on a device with ``memory`` bytes."""
    processes = accelerator.num_processes
    devices = min(processes, accelerator.launch.local_world_size or processes)
    return Machines(memory, devices, processes // devices, accelerator.device.type == "cuda")


def device_memory(gpus: bool) -> int:
    """Bytes of this machine's GPU, or of its free host memory."""
    if gpus:
        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().available


def parse_memory(text: str) -> int:
    """Bytes of ``24GiB``, ``80GB``, ``512MiB`` or a plain number of GiB."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"--gpu-memory {text}: must be a size such as 24GiB, 80GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"

"""The provenance of a run: versions, revision, device."""

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS_OF = (
    "dist-vpt",
    "torch",
    "timm",
    "accelerate",
    "deepspeed",
    "numpy",
    "pydantic",
    "torchmetrics",
    "safetensors",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make a run's numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The revision of the source this package runs from, with ``+changes`` where files differ from it."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        argv = ("git", "--no-optional-locks", *arguments)  # a lock would outlive a kill
        return subprocess.run(argv, cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        if not git("ls-files", Path(__file__).name).strip():  # installed inside another repository
            return None
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def provenance() -> dict[str, Any]:
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "git": git_revision(),
        "versions": versions(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def device_name(device: Any) -> str:
    """The GPU's name, or the processor's model."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"

"""Whether this machine has what several processes need; for `dist-vpt doctor`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


def try_collective() -> str:
    """Sum over a process group of this process alone; returns the backend. Raises RuntimeError where that fails."""
    import torch
    from torch import distributed

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backend = distributed.get_default_backend_for_device(device)
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(1, device=device))
    finally:
        distributed.destroy_process_group()
    return backend


def deepspeed_import_error() -> str:
    """The last line that importing DeepSpeed prints where it fails, or ""; in a process that it may take down."""
    command = [sys.executable, "-c", "import deepspeed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""


def build_tools_missing() -> list[str]:
    """Programs that DeepSpeed needs to build its op for CPUs."""
    compiler = os.environ.get("CXX", "c++")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    return [name for name, found in ((compiler, shutil.which(compiler)), ("ninja", ninja)) if not found]


def extensions_folder() -> Path:
    """Where torch keeps the ops that it builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")

"""The device of the acceptance tests: CUDA, or with DIST_VPT_DRY_GPU_TESTS=1 the CPU, on which the same bodies run.

Run dry, they show that commands, keys and assertions are right as far as a CPU goes, on small models.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import ROOT
from tests.running import train as train_tiny

DRY = os.environ.get("DIST_VPT_DRY_GPU_TESTS") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
KEY = "runtime.device=cpu" if DRY else "runtime.device=auto"
# A ViT-B as users have it, and dry one that takes milliseconds.
BACKBONE = (
    ("backbone.name=test_vit", "backbone.weights=random", "data.image_size=32")
    if DRY
    else ("backbone.name=vit_base_patch16_224", "backbone.weights=random", "data.image_size=224")
)
BATCH = 4 if DRY else 64

accepts = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
cuda_only = pytest.mark.skipif(DRY, reason="has nothing to compute on a CPU")


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """One tiny run on the device, in this process."""
    return train_tiny(folder, KEY, *overrides)


def command(*words: str, seconds: int = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program of the project: its exit code, and what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )

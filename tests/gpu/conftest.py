"""Tests in this folder need a GPU, and are skipped without one, but for those that can run dry (device.py)."""

import pytest
import torch

from tests.gpu.device import DRY, accepts


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    """Skips where torch sees no GPU."""
    dry = DRY and getattr(request.module, "pytestmark", None) is accepts
    if not dry and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")

"""Tests in this folder need a GPU, and are skipped without one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu() -> None:
    """Skips where torch sees no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")

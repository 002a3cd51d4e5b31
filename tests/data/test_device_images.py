"""Images that are cut and flipped on a device, a batch at a time, are those that are cut one by one; on CPU tensors."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.splits import Picture, Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError

CPU = torch.device("cpu")
N = 23


class Noise:
    """Images of many sizes, the fifth of which cannot be read."""

    name = "noise"

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.images = [draw.integers(0, 256, (*draw.integers(16, 40, 2), 3), dtype=np.uint8) for _ in range(N)]


class Pictures(Split):
    def __init__(self) -> None:
        self.noise = Noise()
        super().__init__("train", np.arange(N, dtype=np.int64) % 3, None)  # type: ignore[arg-type]

    def read(self, i: int, max_megapixels: float = 178.0) -> Picture:
        if i == 4:
            raise DataError("broken")
        return self.noise.images[i]

    def where(self, i: int) -> str:
        return f"image {i}"


def batches_of(kind: type, transform: ImageTransform, *, device: bool, budget: float = 1e9) -> Any:
    keys: dict[str, Any] = {"batch_size": 5, "on_decode_error": "skip", "cache": "memory"}
    made = kind(Pictures(), transform, **keys, **({"seed": 3, "same_size": True} if kind is TrainBatches else {}))
    if device:
        made.keep_on(CPU, budget)
    return made


@pytest.mark.parametrize("crop_mode", ["squash", "crop"])
@pytest.mark.parametrize("augment", ["none", "fgvc"])
@pytest.mark.parametrize("interpolation", ["bilinear", "vpt"])
def test_batches_are_equal(interpolation: Any, augment: Any, crop_mode: Any) -> None:
    """Bytes to the bit; the float32 pixels of a vpt resize to the last digit of 255."""
    transform = ImageTransform(16, interpolation, crop_mode, augment)
    for kind in (TrainBatches, EvalBatches):
        host, device = (batches_of(kind, transform, device=on) for on in (False, True))
        epochs = []
        for epoch in (0, 1):
            if kind is TrainBatches:
                pairs = [(a[0], b[0]) for a, b in zip(host.epoch(epoch), device.epoch(epoch), strict=True)]
            else:
                pairs = list(zip(host, device, strict=True))
            assert len(pairs) == 5
            for wanted, found in pairs:
                assert wanted.keys() == found.keys()
                assert wanted["images"].dtype == found["images"].dtype
                torch.testing.assert_close(
                    found["images"], wanted["images"], rtol=0, atol=3e-5 if interpolation == "vpt" else 0
                )
                for name in ("labels", "weight", "index"):
                    assert torch.equal(wanted[name], found[name])
                    assert wanted[name].dtype == found[name].dtype
            order = torch.cat([found["index"] for _, found in pairs])
            images = torch.cat([found["images"] for _, found in pairs])
            epochs.append(images[order.argsort()].float())
        assert device._source._on_device is not None
        assert host.skipped == device.skipped == {"image 4"}
        differs = not torch.equal(*epochs)
        assert differs == (kind is TrainBatches and augment == "fgvc")


def test_what_does_not_fit_stays_in_memory() -> None:
    transform = ImageTransform(16, "bilinear", "squash")
    bytes_of_all = (N - 1) * 3 * 16 * 16
    for budget, fits in ((bytes_of_all, True), (bytes_of_all - 1, False), (0, False)):
        batches = batches_of(EvalBatches, transform, device=True, budget=budget)
        assert len(list(batches)) == 5
        assert (batches._source._on_device is not None) == fits
        assert (batches._source._batches.cached is None) == fits


def test_without_a_cache_nothing_is_kept() -> None:
    batches = EvalBatches(Pictures(), ImageTransform(16, "bilinear"), 5, on_decode_error="skip")
    batches.keep_on(CPU, 1e9)
    assert len(list(batches)) == 5
    assert batches._source._on_device is None  # type: ignore[attr-defined]

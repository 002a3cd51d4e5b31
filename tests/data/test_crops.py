"""Several views of an image in evaluation: torchvision's crops, and the same batches whatever makes them."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from dist_vpt.data.loaders import EvalBatches
from dist_vpt.data.splits import ArraySource, Split
from dist_vpt.data.transforms import ImageTransform

N = 7
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 60, 90, 3), np.uint8)
SPLIT = Split("test", np.arange(N) % 3, ArraySource(PIXELS, "mine"))


@pytest.mark.parametrize("crop_mode", ["crop", "squash"])
def test_views_are_those_of_torchvision(crop_mode: Any) -> None:
    # Of even margins: torchvision takes the center of the mirror image, which of odd ones is a pixel beside.
    transform = ImageTransform(112, "bilinear", crop_mode, test_crops=10)
    side = transform.shorter_side
    size = (side, side * 90 // 60) if crop_mode == "crop" else (side, side)
    picture = Image.fromarray(PIXELS[0])
    resized = functional.pil_to_tensor(functional.resize(picture, size, InterpolationMode.BILINEAR))
    expected = {view.numpy().tobytes() for view in functional.ten_crop(resized, 112)}
    found = transform.eval(picture)
    assert found.shape == (10, 3, 112, 112)
    assert {view.numpy().tobytes() for view in found} == expected
    assert len(expected) == 10
    five = ImageTransform(112, "bilinear", crop_mode, test_crops=5).eval(picture)
    assert {view.numpy().tobytes() for view in five} == {
        v.numpy().tobytes() for v in functional.five_crop(resized, 112)
    }


@pytest.mark.parametrize("interpolation", ["bilinear", "vpt"])
def test_two_views_are_the_usual_one_and_its_mirror_image(interpolation: Any) -> None:
    plain = ImageTransform(32, interpolation, "squash").eval(PIXELS[0])
    found = ImageTransform(32, interpolation, "squash", test_crops=2).eval(PIXELS[0])
    assert torch.equal(found, torch.stack([plain, plain.flip(-1)]))
    assert found.dtype == plain.dtype


def test_training_has_one_view() -> None:
    for augment in ("none", "fgvc"):
        plain, crops = (ImageTransform(32, "bilinear", "crop", augment, test_crops=n) for n in (1, 10))  # type: ignore[arg-type]
        assert torch.equal(plain.train(PIXELS[0], 1, 2, 3), crops.train(PIXELS[0], 1, 2, 3))


@pytest.mark.parametrize("interpolation", ["bilinear", "vpt"])
@pytest.mark.parametrize(("workers", "cache"), [(0, "none"), (2, "none"), (0, "memory"), (2, "memory")])
def test_batches_hold_all_views(interpolation: Any, workers: int, cache: Any) -> None:
    transform = ImageTransform(16, interpolation, "crop", test_crops=5)
    loader = EvalBatches(SPLIT, transform, 3, workers=workers, cache=cache)
    if cache == "memory" and workers == 0:
        loader.keep_on(torch.device("cpu"), 1e9)  # as on a GPU
    found = [(batch["images"].clone(), batch["index"]) for batch in loader]
    loader.close()
    assert [images.shape for images, _ in found] == [(3, 5, 3, 16, 16), (3, 5, 3, 16, 16), (1, 5, 3, 16, 16)]
    for images, index in found:
        for image, i in zip(images, index.tolist(), strict=True):
            assert torch.equal(image, transform.eval(PIXELS[i]))

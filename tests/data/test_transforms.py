"""Views: sizes, exactness against torchvision, and what the random part depends on."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from dist_vpt.data.transforms import ImageTransform, vpt_resize


def picture(width=90, height=61, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


KERNELS = {"bilinear": tv.InterpolationMode.BILINEAR, "bicubic": tv.InterpolationMode.BICUBIC}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64), (33, 200), (500, 301), (20, 20)])
def test_squash_and_crop_are_torchvisions(kernel, size):
    image = picture(*size)
    squash = ImageTransform(48, kernel, "squash").eval(image)
    assert torch.equal(squash, tv.PILToTensor()(tv.Resize((48, 48), KERNELS[kernel])(image)))
    for side in (48, 49):
        transform = ImageTransform(side, kernel, "crop")
        theirs = tv.Compose([tv.Resize(transform.shorter_side, KERNELS[kernel]), tv.CenterCrop(side), tv.PILToTensor()])
        assert torch.equal(transform.eval(image), theirs(image))


def test_shorter_sides():
    sizes = {448: 512, 384: 438, 336: 384, 224: 256, 112: 128, 32: 37, 240: 274}
    assert {size: ImageTransform(size, "bicubic").shorter_side for size in sizes} == sizes


def test_arrays_and_pictures_give_the_same():
    transform, image = ImageTransform(16, "bicubic", "crop"), picture()
    assert torch.equal(transform.eval(np.asarray(image)), transform.eval(image))


def test_without_augmentation_training_sees_what_evaluation_sees():
    for crop_mode in ("squash", "crop"):
        transform = ImageTransform(16, "bilinear", crop_mode)
        assert torch.equal(transform.train(picture(), 0, 5, 7), transform.eval(picture()))


@pytest.mark.parametrize(("crop_mode", "width"), [("crop", 54), ("squash", 37)])
def test_random_part_is_a_crop_and_a_flip(crop_mode, width):
    transform = ImageTransform(32, "bicubic", crop_mode, "fgvc")
    image = picture()
    whole = transform.fixed(image, train=True)
    assert whole.shape == (37, width, 3)
    windows = {}
    for top in range(37 - 32 + 1):
        for left in range(width - 32 + 1):
            window = whole[top : top + 32, left : left + 32]
            windows[window.tobytes()] = (top, left, 0)
            windows[window[:, ::-1].tobytes()] = (top, left, 1)
    drawn = []
    for epoch in range(400):
        pixels = transform.train(image, 0, epoch, 3)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 32))
        drawn.append(windows[pixels.numpy().transpose(1, 2, 0).tobytes()])
    tops, lefts, flips = (np.array(part) for part in zip(*drawn, strict=True))
    assert set(tops) == set(range(6))  # every place up to the last is drawn
    assert set(lefts) == set(range(width - 31))
    assert 150 < flips.sum() < 250


def test_random_part_depends_on_seed_epoch_and_index_alone():
    transform, image = ImageTransform(32, "bicubic", "crop", "fgvc"), picture(400, 61)

    def draw(*key):
        return transform.train(image, *key).numpy().tobytes()

    torch.manual_seed(0)
    np.random.seed(0)
    first = draw(1, 2, 3)
    torch.rand(3)
    np.random.rand(3)
    assert draw(1, 2, 3) == first
    others = [draw(s, e, i) for s in range(3) for e in range(3) for i in range(3)]
    assert len(set(others)) >= 25


def test_evaluation_of_an_augmented_view_is_not_random():
    image = picture()
    assert torch.equal(
        ImageTransform(32, "bicubic", "crop", "fgvc").eval(image), ImageTransform(32, "bicubic", "crop").eval(image)
    )
    squashed = ImageTransform(32, "bicubic", "squash", "fgvc")
    assert torch.equal(squashed.eval(image), ImageTransform(32, "bicubic", "squash").eval(image))


def slow_resize(pixels, height, width):
    """The published kernel pixel by pixel in float64."""
    found = np.zeros((height, width, 3))
    for i in range(height):
        for j in range(width):
            y, x = i * (pixels.shape[0] / height), j * (pixels.shape[1] / width)
            top, left = int(np.floor(y)), int(np.floor(x))
            below, right = min(top + 1, pixels.shape[0] - 1), min(left + 1, pixels.shape[1] - 1)
            upper = pixels[top, left] * (1 - (x - left)) + pixels[top, right] * (x - left)
            lower = pixels[below, left] * (1 - (x - left)) + pixels[below, right] * (x - left)
            found[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return found


def column(*values):
    return np.array(values, np.uint8)[:, None, None].repeat(3, 2)


def test_vpt_resize_of_small_arrays_by_hand():
    # Doubled: places 0, 0.5, 1, 1.5; the last lies between the last pixel and itself.
    assert vpt_resize(column(10, 20), 4, 1)[:, 0, 0].tolist() == [10, 15, 20, 20]
    # Halved: every second pixel, nothing is averaged.
    assert vpt_resize(column(1, 100, 3, 100), 2, 1)[:, 0, 1].tolist() == [1, 3]
    # 3 to 2: places 0 and 1.5.
    assert vpt_resize(column(0, 10, 30), 2, 1)[:, 0, 2].tolist() == [0, 20]
    square = np.array([[0, 100], [50, 250]], np.uint8)[:, :, None].repeat(3, 2)
    assert vpt_resize(square, 4, 4)[:, :, 0].tolist() == [
        [0, 50, 100, 100],
        [25, 100, 175, 175],
        [50, 150, 250, 250],
        [50, 150, 250, 250],
    ]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 96), (256, 256), (375, 500), (375, 1242)])
def test_vpt_resize_is_its_formula(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    found = vpt_resize(pixels, 224, 224)
    assert found.dtype == np.float32
    rounding = 255 * max(size) * np.finfo(np.float32).eps  # of places, which TensorFlow has in float32
    assert np.abs(found - slow_resize(pixels.astype(np.float64), 224, 224)).max() < rounding


def test_vpt_view_is_float_and_keeps_whole_pictures():
    image, transform = picture(90, 61), ImageTransform(48, "vpt")
    kept = transform.fixed(image, train=True)
    assert (kept.dtype, kept.shape) == (np.uint8, (61, 90, 3))
    shown = transform.eval(image)
    assert (shown.dtype, shown.shape) == (torch.float32, (3, 48, 48))
    assert np.array_equal(shown.numpy().transpose(1, 2, 0), vpt_resize(np.asarray(image), 48, 48))
    assert torch.equal(transform.train(image, 0, 3, 4), shown)


def test_vpt_view_may_be_cropped():
    image = picture(90, 61)
    shown = ImageTransform(48, "vpt", "crop").eval(image).numpy().transpose(1, 2, 0)
    whole = vpt_resize(np.asarray(image), 55, 81)  # 48 px are cut out of a shorter side of 55
    assert np.array_equal(shown, whole[4:52, 16:64])
    pixels = ImageTransform(48, "vpt", "crop", "fgvc").train(image, 0, 1, 2).numpy().transpose(1, 2, 0)
    windows = [whole[i : i + 48, j : j + 48] for i in range(8) for j in range(34)]
    assert any(np.array_equal(pixels, cut) or np.array_equal(pixels, cut[:, ::-1]) for cut in windows)

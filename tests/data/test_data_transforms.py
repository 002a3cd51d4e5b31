"""Views: sizes, exactness against torchvision, and what the random part depends on."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv

from dist_vpt.data.transforms import View


def picture(width=90, height=61, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


KERNELS = {"bilinear": tv.InterpolationMode.BILINEAR, "bicubic": tv.InterpolationMode.BICUBIC}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [(90, 61), (61, 90), (64, 64), (33, 200), (500, 301), (20, 20)])
def test_squash_and_crop_are_torchvisions(kernel, size):
    image = picture(*size)
    squash = View(48, kernel, "squash").eval(image)
    assert torch.equal(squash, tv.PILToTensor()(tv.Resize((48, 48), KERNELS[kernel])(image)))
    for side in (48, 49):
        view = View(side, kernel, "crop")
        theirs = tv.Compose([tv.Resize(view.shorter_side, KERNELS[kernel]), tv.CenterCrop(side), tv.PILToTensor()])
        assert torch.equal(view.eval(image), theirs(image))


def test_shorter_sides():
    sizes = {448: 512, 384: 438, 336: 384, 224: 256, 112: 128, 32: 37, 240: 274}
    assert {size: View(size, "bicubic").shorter_side for size in sizes} == sizes


def test_arrays_and_pictures_give_the_same():
    view, image = View(16, "bicubic", "crop"), picture()
    assert torch.equal(view.eval(np.asarray(image)), view.eval(image))


def test_without_augmentation_training_sees_what_evaluation_sees():
    for resize in ("squash", "crop"):
        view = View(16, "bilinear", resize)
        assert torch.equal(view.train(picture(), 0, 5, 7), view.eval(picture()))


@pytest.mark.parametrize(("resize", "width"), [("crop", 54), ("squash", 37)])
def test_random_part_is_a_crop_and_a_flip(resize, width):
    view = View(32, "bicubic", resize, "fgvc")
    image = picture()
    whole = view.fixed(image, train=True)
    assert whole.shape == (37, width, 3)
    windows = {}
    for top in range(37 - 32 + 1):
        for left in range(width - 32 + 1):
            window = whole[top : top + 32, left : left + 32]
            windows[window.tobytes()] = (top, left, 0)
            windows[window[:, ::-1].tobytes()] = (top, left, 1)
    drawn = []
    for epoch in range(400):
        pixels = view.train(image, 0, epoch, 3)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 32, 32))
        drawn.append(windows[pixels.numpy().transpose(1, 2, 0).tobytes()])
    tops, lefts, flips = (np.array(part) for part in zip(*drawn, strict=True))
    assert set(tops) == set(range(6))  # every place up to the last is drawn
    assert set(lefts) == set(range(width - 31))
    assert 150 < flips.sum() < 250


def test_random_part_depends_on_seed_epoch_and_index_alone():
    view, image = View(32, "bicubic", "crop", "fgvc"), picture(400, 61)

    def draw(*key):
        return view.train(image, *key).numpy().tobytes()

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
    assert torch.equal(View(32, "bicubic", "crop", "fgvc").eval(image), View(32, "bicubic", "crop").eval(image))
    squashed = View(32, "bicubic", "squash", "fgvc")
    assert torch.equal(squashed.eval(image), View(32, "bicubic", "squash").eval(image))

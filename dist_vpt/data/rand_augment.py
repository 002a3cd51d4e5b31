"""timm's RandAugment as a pure function of (seed, epoch, image).

H, W height and width.

timm draws from the generators of Python and numpy, which are seeded for each image and given back as they were.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
from PIL import Image

RAND_AUGMENT, ERASING, MIXING = 1, 2, 3  # what a seed is for


@contextmanager
def seeded(*key: int) -> Iterator[int]:
    """Within this the generators of Python and numpy are seeded by the key, whose seed this gives."""
    python, legacy = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield seed
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def rand_augmented(pixels_HW3: np.ndarray, policy: str, mean: tuple[float, ...], *key: int) -> np.ndarray:
    """timm's RandAugment (Cubuk et al. 2020, arXiv 1909.13719) of an image, uint8 [H, W, 3].

    ``policy``: timm's, such as rand-m9-mstd0.5-inc1; ``mean``: of the channels in [0, 1], with which what comes into
    the image is filled; ``key``: seed, epoch, image.
    """
    transform = _rand_augment(policy, tuple(mean), min(pixels_HW3.shape[:2]))
    with seeded(*key, RAND_AUGMENT):
        return np.asarray(transform(Image.fromarray(pixels_HW3)))


@cache
def _rand_augment(policy: str, mean: tuple[float, ...], side: int) -> Any:
    from timm.data import rand_augment_transform

    # As timm's create_transform sets them.
    settings = {"translate_const": int(side * 0.45), "img_mean": tuple(min(255, round(255 * value)) for value in mean)}
    transform = rand_augment_transform(policy, settings)
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterized, operation.aug_fn)
    return transform


def _posterized(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """timm's posterize; where it keeps no bit of a color, which Pillow refuses, the image is black."""
    return Image.new(image.mode, image.size) if bits < 1 else posterize(image, bits, **settings)

"""White shapes on black, drawn by formula: two structured tasks that need no download, in the manner of dSprites.

A square, an ellipse or a heart, in six sizes, 40 orientations and 32 x 32 places on 64 x 64 pixels, as in dSprites
(Matthey et al., 2017). As in VTAB-1k's dsprites_ori and dsprites_loc (arXiv 1910.04867), 800 images are train, 200 val
and 1,000 test, and the label is one of 16 bins:

    shapes_ori   label = orientation // 2.5    40 orientations, 9 degrees apart, counter-clockwise
    shapes_loc   label = x // 2                32 places of the center, 1 pixel apart, at x + 16.5 pixels from the left

**No method can pass 58.3 % in shapes_ori** but by luck. VTAB keeps the raw angle of all three shapes, and so does this
task: a square looks the same at four angles, in four different bins, and an ellipse at two. The best guess is right
for 1/4 of the squares, 1/2 of the ellipses and all hearts: (1/4 + 1/2 + 1) / 3. Shapes without symmetry would hide what
makes the published scores of dsprites_ori low. In shapes_loc 100 % can be reached.

Everything is computed in whole numbers, and images are chosen by ``shuffled``, so that every machine and version of
numpy draws the same pixels. An edge is smooth: a pixel is white in proportion to its area inside the shape, of which 64
points are looked at.
"""

from functools import lru_cache

import numpy as np

from dist_vpt.data.config import DataConfig
from dist_vpt.data.splits import ArraySource, Split, Splits, join, shuffled
from dist_vpt.data.tasks import Task

SIDE = 64  # pixels
SHAPES, SIZES, ORIENTATIONS, PLACES = 3, 6, 40, 32  # PLACES: of the center, in x and in y
COUNTS = {"train": 800, "val": 200, "test": 1000}  # images
BINS = 16  # classes of either task

REACH = 16  # pixels that a shape reaches from its center's pixel, at most
SAMPLES = 8  # in a row and in a column of a pixel
# cos(9 degrees * k) * 4096 for k = 0 to 10: written out, since cos is not the same to the last bit on every machine.
COS = (4096, 4046, 3896, 3650, 3314, 2896, 2408, 1860, 1266, 641, 0)
UNIT = 2 * SAMPLES * COS[0]  # of the coordinates below, per pixel
# Of the largest shapes, in pixels: half a square's side, an ellipse's half-axes, and a heart's radius. A heart is a
# square of two radii, its point down, with half a disc on each of the upper sides. Areas are about 400 square pixels.
SQUARE, ELLIPSE, HEART = 10.0, (15.0, 8.5), 7.5
CENTROID = 0.3133  # of a heart, from its square's center towards each disc, in radii: (pi / 2 + 2 / 3) / (4 + pi)


def open_splits(recipe: DataConfig, task: Task) -> Splits:
    """2,000 of the 737,280 images, no two of one shape, size, orientation and place; ``split_seed`` chooses them."""
    pixels, factors = _images(recipe.split_seed)
    orientation, x = factors[2], factors[4]
    labels = 2 * orientation // 5 if task.name == "shapes_ori" else x // 2
    every, splits, first = Split("every", labels, ArraySource(pixels, task.name)), {}, 0
    for name, count in COUNTS.items():
        splits[name] = every.subset(name, np.arange(first, first + count))
        first += count
    train, val, test = splits.values()
    return Splits(class_names(task.name), train, val, join("trainval", train, val), test)


def class_names(task: str) -> tuple[str, ...]:
    """The bins of a task: of the orientation in degrees, or of the center's distance from the left edge in pixels."""
    if task == "shapes_ori":
        width = 360 / BINS
        return tuple(f"{k * width:g}-{(k + 1) * width:g} degrees" for k in range(BINS))
    left, width = SIDE // 2 - PLACES // 2, PLACES // BINS
    return tuple(f"{left + k * width}-{left + (k + 1) * width} px" for k in range(BINS))


@lru_cache(maxsize=2)  # both tasks have the same images
def _images(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, SIDE, SIDE, 3], and their factors int64 [5, n]: shape, size, orientation, y, x."""
    dimensions = (SHAPES, SIZES, ORIENTATIONS, PLACES, PLACES)
    chosen = shuffled(int(np.prod(dimensions)), seed)[: sum(COUNTS.values())]
    factors = np.stack(np.unravel_index(chosen, dimensions))
    gray = np.zeros((len(chosen), SIDE, SIDE), np.uint8)
    drawn: dict[tuple[int, int, int], np.ndarray] = {}
    for image, (shape, size, orientation, y, x) in zip(gray, factors.T.tolist(), strict=True):
        key = (shape, size, orientation)
        if key not in drawn:
            drawn[key] = draw(*key)
        image[y : y + 2 * REACH + 1, x : x + 2 * REACH + 1] = drawn[key]
    return np.repeat(gray[..., None], 3, axis=-1), factors


def draw(shape: int, size: int, orientation: int) -> np.ndarray:
    """uint8 [33, 33], the centroid in the middle. ``shape``: 0 square, 1 ellipse, 2 heart; ``size``: 0 (half) to 5.

    ``orientation`` 0: the ellipse's long axis is horizontal and the heart stands upright.
    """
    tenths = size + 5  # of the largest
    u, v = _rotated(orientation + 5 if shape == 2 else orientation)  # a heart's square stands on its corner
    u, v = 10 * u, 10 * v

    def length(pixels: float) -> int:
        return round(pixels * UNIT) * tenths

    if shape == 0:
        inside = np.maximum(abs(u), abs(v)) <= length(SQUARE)
    elif shape == 1:
        a, b = (round(2 * each) for each in ELLIPSE)  # in half pixels
        inside = (u * b) ** 2 + (v * a) ** 2 <= (length(0.5) * a * b) ** 2
    else:
        radius, shift = length(HEART), length(HEART * CENTROID)
        u, v = u + shift, v + shift
        inside = np.maximum(abs(u), abs(v)) <= radius
        inside |= (u - radius) ** 2 + v**2 <= radius**2
        inside |= u**2 + (v - radius) ** 2 <= radius**2
    side = 2 * REACH + 1
    samples = inside.reshape(side, SAMPLES, side, SAMPLES).sum((1, 3), dtype=np.int64)
    return ((255 * samples + SAMPLES**2 // 2) // SAMPLES**2).astype(np.uint8)


def _rotated(orientation: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the middle of an image, in coordinates that turn with the shape: int64, in 1 / UNIT pixels."""
    last = (2 * REACH + 1) * SAMPLES - 1
    x = np.arange(-last, last + 1, 2)[None, :]  # in 1 / (2 * SAMPLES) pixels
    y = -x.T  # up
    cos, sin = _cos(orientation), _cos(orientation - 10)
    return cos * x + sin * y, cos * y - sin * x


def _cos(k: int) -> int:
    """4096 times the cosine of 9 degrees * k."""
    k = min(k % 40, -k % 40)
    return COS[k] if k <= 10 else -COS[20 - k]

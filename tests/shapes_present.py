"""A made set whose images have several labels or none: which of four shapes are in a picture."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("bar", "cross", "disk", "frame")  # in the order in which a table without other order has them
SIDE = 24  # pixels, the demo backbone's


def labels_of(count: int, seed: int) -> np.ndarray:
    """uint8 [count, 4]: each shape is in about two of five pictures, whatever else is in it."""
    return (np.random.default_rng(seed).random((count, len(SHAPES))) < 0.4).astype(np.uint8)


def draw(labels_K: np.ndarray, seed: int) -> Image.Image:
    """A picture with the shapes whose label is 1, each in one of four corners and of a gray of its own."""
    chance = np.random.default_rng((seed, 1))
    red, green, blue = (int(v) for v in chance.integers(0, 64, 3))  # so that no two pictures are equal
    image = Image.new("RGB", (SIDE, SIDE), (red, green, blue))
    pen, corners = ImageDraw.Draw(image), chance.permutation(4)
    for k in np.flatnonzero(labels_K):
        x, y = (int(v) + int(chance.integers(0, 2)) for v in (1 + 12 * (corners[k] % 2), 1 + 12 * (corners[k] // 2)))
        color = (int(chance.integers(140, 256)),) * 3
        if SHAPES[k] == "disk":
            pen.ellipse((x, y, x + 8, y + 8), fill=color)
        elif SHAPES[k] == "frame":
            pen.rectangle((x, y, x + 8, y + 8), outline=color, width=1)
        elif SHAPES[k] == "cross":
            pen.line((x, y, x + 8, y + 8), fill=color, width=2)
            pen.line((x, y + 8, x + 8, y), fill=color, width=2)
        else:
            pen.rectangle((x, y + 3, x + 8, y + 5), fill=color)
    return image


def write_pictures(folder: Path, count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Write ``count`` pictures; returns their names and their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    labels_nK, names = labels_of(count, seed), [f"{i:04d}.png" for i in range(count)]
    for i, name in enumerate(names):
        draw(labels_nK[i], seed * 100_000 + i).save(folder / name)
    return names, labels_nK


def write_table(folder: Path, count: int, seed: int = 0) -> tuple[str, ...]:
    """Write ``count`` pictures and their table, a column of 0 and 1 for each shape; returns the overrides to use it.

    Three fifths are train, a fifth each val and test.
    """
    names, labels_nK = write_pictures(folder, count, seed)
    lines = [",".join(("image", *SHAPES, "split"))]
    for i, (name, row) in enumerate(zip(names, labels_nK, strict=True)):
        split = "train" if i % 5 < 3 else "val" if i % 5 == 3 else "test"
        lines.append(",".join((name, *map(str, row), split)))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return ("data.task=mine", "data.format=table", f"data.root={folder / 'labels.csv'}", "data.labels=multiple")

"""The protocol of VTAB-1k, written out plainly: slices by their places, labels and images from TFDS's own readers."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

BUILDERS = {
    "cifar100": "cifar100",
    "caltech101": "caltech101",
    "dtd": "dtd",
    "oxford_flowers102": "oxford_flowers102",
    "oxford_iiit_pet": "oxford_iiit_pet",
    "svhn": "svhn_cropped",
    "sun397": "sun397/tfds",
    "patch_camelyon": "patch_camelyon",
    "eurosat": "eurosat/rgb",
    "resisc45": "resisc45",
    "diabetic_retinopathy": "diabetic_retinopathy_detection/btgraham-300",
    "clevr_count": "clevr",
    "clevr_dist": "clevr",
    "dmlab": "dmlab",
    "kitti": "kitti",
    "dsprites_loc": "dsprites",
    "dsprites_ori": "dsprites",
    "smallnorb_azi": "smallnorb",
    "smallnorb_ele": "smallnorb",
}


def slices(task: str, n: dict[str, int]) -> dict[str, tuple[str, int, int]]:  # noqa: PLR0911 (a case a task)
    """train800, val200 and test as (split, first, one after the last), of splits with so many examples."""
    train = ("train", 0, 800)
    if task in ("cifar100", "caltech101", "svhn"):
        cut = 90 * n["train"] // 100
        return {"train": train, "val": ("train", cut, cut + 200), "test": ("test", 0, n["test"])}
    if task == "oxford_iiit_pet":
        cut = 80 * n["train"] // 100
        return {"train": train, "val": ("train", cut, cut + 200), "test": ("test", 0, n["test"])}
    if task in ("eurosat", "resisc45"):
        cut, end = 60 * n["train"] // 100, 80 * n["train"] // 100
        return {"train": train, "val": ("train", cut, cut + 200), "test": ("train", end, n["train"])}
    if task.startswith("clevr"):
        cut = 90 * n["train"] // 100
        return {"train": train, "val": ("train", cut, cut + 200), "test": ("validation", 0, n["validation"])}
    if task.startswith("dsprites"):
        cut, end = 80 * n["train"] // 100, 90 * n["train"] // 100
        return {"train": train, "val": ("train", cut, cut + 200), "test": ("train", end, n["train"])}
    if task.startswith("smallnorb"):
        return {"train": train, "val": ("test", 0, 200), "test": ("test", 50 * n["test"] // 100, n["test"])}
    return {"train": train, "val": ("validation", 0, 200), "test": ("test", 0, n["test"])}


def label(task: str, example: dict[str, Any]) -> int:  # noqa: PLR0911 (a case a task)
    if task == "clevr_count":
        return len(example["objects"]["size"]) - 3
    if task == "clevr_dist":
        nearest = min(np.float32(place[2]) for place in example["objects"]["pixel_coords"])
        return clevr_bin(nearest)
    if task == "kitti":
        objects = example["objects"]
        vehicles = [
            place[2] for kind, place in zip(objects["type"], objects["location"], strict=True) if kind in (0, 1, 2)
        ]
        return kitti_bin(min([np.float32(1000), *vehicles]))
    if task == "dsprites_loc":
        return int(np.floor(example["label_x_position"] / 2))
    if task == "dsprites_ori":
        return int(np.floor(example["label_orientation"] / 2.5))
    if task == "smallnorb_azi":
        return int(example["label_azimuth"])
    if task == "smallnorb_ele":
        return int(example["label_elevation"])
    return int(example["label"])


def clevr_bin(distance: float) -> int:
    if distance <= 8.0:
        return 0
    if distance <= 8.5:
        return 1
    if distance <= 9.0:
        return 2
    if distance <= 9.5:
        return 3
    return 4 if distance <= 10.0 else 5


def kitti_bin(distance: float) -> int:
    if distance <= 8.0:
        return 0
    if distance <= 20.0:
        return 1
    return 2 if distance <= 999.0 else 3


def image(task: str, encoded: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if encoded.startswith(b"\xff\xd8"):
        return simplejpeg.decode_jpeg(encoded, fastdct=True)
    pixels = np.asarray(Image.open(io.BytesIO(encoded)))
    if task.startswith("dsprites"):
        pixels = pixels * 255
    return pixels if pixels.ndim == 3 else np.stack([pixels, pixels, pixels], axis=2)


def examples(task: str, root: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Label and pixels of every example of train, val and test, out of prepared ArrayRecord files."""
    builder = tfds.builder(BUILDERS[task], data_dir=str(root))
    n = {name: split.num_examples for name, split in builder.info.splits.items()}
    found = {}
    for name, (split, first, end) in slices(task, n).items():
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        some = [source[i] for i in range(first, end)]
        found[name] = [(label(task, example), image(task, example["image"])) for example in some]
    return found

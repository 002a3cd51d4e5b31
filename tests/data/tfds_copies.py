"""Small prepared copies of the TFDS builders of VTAB-1k, made offline from the builders' own features."""

import io
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

ROOT = Path(__file__).parents[2]
# Builder -> examples of each split, the least with which the published slices have 800 and 200 examples.
SIZES = {
    "cifar100": {"train": 2000, "test": 60},
    "caltech101": {"train": 2000, "test": 60},
    "dtd": {"train": 850, "validation": 220, "test": 60},
    "oxford_flowers102": {"train": 850, "validation": 220, "test": 60},
    "oxford_iiit_pet": {"train": 1010, "test": 60},
    "svhn_cropped": {"train": 2005, "test": 60},
    "sun397/tfds": {"train": 850, "validation": 220, "test": 60},
    "patch_camelyon": {"train": 850, "validation": 220, "test": 60},
    "eurosat/rgb": {"train": 1403},
    "resisc45": {"train": 1403},
    "diabetic_retinopathy_detection/btgraham-300": {"train": 850, "validation": 220, "test": 60},
    "clevr": {"train": 2000, "validation": 60},
    "dmlab": {"train": 850, "validation": 220, "test": 60},
    "kitti": {"train": 850, "validation": 220, "test": 60},
    "dsprites": {"train": 2003},
    "smallnorb": {"train": 850, "test": 407},
}
CLEVR_DISTANCES = (7.5, 8.0, 8.25, 8.5, 9.0, 9.3, 9.5, 9.75, 10.0, 10.5)  # edges of bins among them
KITTI_DISTANCES = (-3.0, 7.9, 8.0, 8.1, 19.9, 20.0, 20.1, 70.0)
PICTURES = 7  # different ones of a builder
JPEG = ("caltech101", "sun397/tfds", "resisc45", "kitti")  # stored so; all others as PNG


def prepare(root: Path, builders: tuple[str, ...] = tuple(SIZES)) -> Path:
    """Prepare copies as ArrayRecord files below ``root``, which is returned."""
    tfds.disable_progress_bar()
    for name in builders:
        builder: Any = tfds.builder(name, data_dir=str(root))
        pictures = _pictures(name, builder.info.features)
        builder._split_generators = lambda _, name=name, builder=builder, pictures=pictures: {
            split: _examples(name, split, count, builder.info.features, pictures)
            for split, count in SIZES[name].items()
        }
        config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        builder.download_and_prepare(file_format="array_record", download_config=config)
    return root


def as_tfrecord(prepared: Path, root: Path) -> Path:
    """The same records as TFRecord files, which TFDS itself writes with TensorFlow alone; returns ``root``."""
    for file in prepared.rglob("*"):
        target = root / str(file.relative_to(prepared)).replace(".array_record-", ".tfrecord-")
        target.parent.mkdir(parents=True, exist_ok=True)
        if ".array_record-" in file.name:
            reader = ArrayRecordReader(str(file))
            target.write_bytes(b"".join(map(_framed, reader.read_all())))
            reader.close()
        elif file.is_file():
            target.write_text(file.read_text().replace('"array_record"', '"tfrecord"'))
    return root


def _framed(record: bytes) -> bytes:
    """Length, its checksum, the record, its checksum."""
    length = struct.pack("<Q", len(record))
    return length + struct.pack("<I", _masked(length)) + record + struct.pack("<I", _masked(record))


def _masked(data: bytes) -> int:
    crc = crc32c.crc32c(data)
    return ((crc >> 15) + ((crc & 0x7FFF) << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _pictures(name: str, features: Any) -> list[bytes]:
    """Encoded pictures of odd sizes, or of the size that the builder has."""
    height, width, channels = features["image"].shape
    noise = np.random.default_rng(len(name))
    made = []
    for k in range(PICTURES):
        size = (height or 40 + 3 * k, width or 61 - 2 * k)
        pixels = noise.integers(0, 2 if name == "dsprites" else 256, (5, 6, channels), np.uint8)
        pixels = pixels.repeat(-(-size[0] // 5), 0).repeat(-(-size[1] // 6), 1)[: size[0], : size[1]]
        file = io.BytesIO()
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        image.save(file, "JPEG" if name in JPEG else "PNG")
        made.append(file.getvalue())
    return made


def _examples(
    name: str, split: str, count: int, features: Any, pictures: list[bytes]
) -> Iterator[tuple[int, dict[str, Any]]]:
    noise = np.random.default_rng([len(name), len(split)])
    for i in range(count):
        example = {key: _value(feature, noise) for key, feature in features.items()}
        example["image"] = io.BytesIO(pictures[i % PICTURES])
        if name == "clevr":
            example["objects"] = [_drawn(features["objects"], noise) for _ in range(3 + i % 8)]
            for thing in example["objects"]:
                thing["pixel_coords"] = noise.choice(CLEVR_DISTANCES, 3).astype("f")
        if name == "kitti":
            example["objects"] = [_drawn(features["objects"], noise) for _ in range(i % 4)]
            for thing in example["objects"]:
                thing["location"] = noise.choice(KITTI_DISTANCES, 3).astype("f")
        yield i, example


def _drawn(sequence: Any, noise: np.random.Generator) -> dict[str, Any]:
    return {key: _value(feature, noise) for key, feature in sequence.feature.items()}


def _value(feature: Any, noise: np.random.Generator) -> Any:  # noqa: PLR0911 (a case a kind of feature)
    """Something that a feature takes."""
    if isinstance(feature, tfds.features.ClassLabel):
        return int(noise.integers(feature.num_classes))
    if isinstance(feature, tfds.features.BBoxFeature):
        return tfds.features.BBox(0.1, 0.1, 0.5, 0.5)
    if isinstance(feature, tfds.features.Text):
        return "text"
    if isinstance(feature, tfds.features.Image):
        return io.BytesIO(_png(feature.shape))
    if isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
        return []
    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: _value(inner, noise) for key, inner in feature.items()}
    if feature.shape:
        return noise.random(feature.shape).astype(feature.np_dtype)
    return noise.integers(0, 32) if np.issubdtype(feature.np_dtype, np.integer) else np.float32(noise.random())


def _png(shape: tuple[int | None, ...]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((shape[0] or 8, shape[1] or 8), np.uint8)).save(file, "PNG")
    return file.getvalue()


def elsewhere(folder: Path, *builders: str) -> Path:
    """TFRecord copies made by another process: one that has used ArrayRecord must not be forked."""
    subprocess.run([sys.executable, "-m", "tests.data.tfds_copies", str(folder), *builders], check=True, cwd=ROOT)
    return folder / "tfrecord"


if __name__ == "__main__":
    home = Path(sys.argv[1])
    as_tfrecord(prepare(home / "array_record", tuple(sys.argv[2:])), home / "tfrecord")

"""How fast images are loaded, and how much memory a large split takes.

    python benchmarks/loader.py [--images 1500] [--examples 73728]      (needs dist-vpt[tfds])

Two measurements, made on files of their own in a temporary folder:

- images/s of training batches of 500 x 375 JPEGs (vtab-1k folder, `vpt` resize to 224 px, 2 workers), and of a bare
  loop of decoding and resizing in 2 processes on the same files, in turns; the medians, and that of the turns' ratios.
- resident memory of this process and its workers (a page that they share counts once) while a split of dSprites-sized
  pictures (64 x 64 PNG in TFRecord files) is evaluated at 64 px, beyond what the process took before the split was
  opened.

The last line of output is one JSON object.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.formats.tfds import FileInstruction, TfdsSource
from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.splits import LazyLabels, Split
from dist_vpt.data.transforms import ImageTransform, vpt_resize
from dist_vpt.runs.provenance import versions
from dist_vpt.runtime.allocator import keep_freed_memory

MIB = 2**20
SIDE = 224
WORKERS = 2
BATCH = 64
TURNS = 9


def main() -> None:
    """Measure, and print the result as the last line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--images", type=int, default=1500, help="JPEGs (1500)")
    parser.add_argument("--examples", type=int, default=73728, help="dSprites-sized pictures (73728, its test split)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        speeds = speed(Path(folder), options.images)
        memory = resident_mib(Path(folder), options.examples)
    found = {**speeds, **memory, "cores": multiprocessing.cpu_count(), "versions": versions()}
    print(json.dumps(found))


def speed(folder: Path, images: int) -> dict[str, float]:
    """images/s of the loader and of the bare loop."""
    keep_freed_memory()  # as training does
    root = make_jpegs(folder / "jpegs", images)
    split = open_splits(DataConfig(task="jpegs", format="vtab_folder", root=str(root))).train
    batches = TrainBatches(split, ImageTransform(SIDE, "vpt"), batch_size=BATCH, workers=WORKERS)
    for _ in batches.epoch(0):  # workers have started, files are in the page cache
        pass
    loader, bare = [], []
    with multiprocessing.get_context("forkserver").Pool(WORKERS) as pool:
        files = sorted(str(path) for path in (root / "images").iterdir())
        chunks = [files[k : k + BATCH] for k in range(0, images, BATCH)]
        pool.map(decode_and_resize, chunks[:WORKERS])
        for turn in range(TURNS):
            began = time.perf_counter()
            for _ in batches.epoch(turn + 1):
                pass
            loader.append(images / (time.perf_counter() - began))
            began = time.perf_counter()
            for _ in pool.imap(decode_and_resize, chunks):
                pass
            bare.append(images / (time.perf_counter() - began))
    batches.close()
    return {
        "loader_images_per_s": round(statistics.median(loader), 1),
        "bare_images_per_s": round(statistics.median(bare), 1),
        "loader_over_bare": round(statistics.median(a / b for a, b in zip(loader, bare, strict=True)), 3),
    }


def decode_and_resize(files: list[str]) -> int:
    """The bare work on a batch, whose pixels stay where they are."""
    pixels = np.empty((len(files), SIDE, SIDE, 3), np.float32)
    for i, file in enumerate(files):
        with Image.open(file) as image:
            pixels[i] = vpt_resize(np.asarray(image.convert("RGB")), SIDE, SIDE)
    return len(pixels)


def make_jpegs(root: Path, images: int) -> Path:
    """A vtab-1k folder of 500 x 375 pictures with smooth noise, about as large as photographs."""
    (root / "images").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(images):
        small = Image.fromarray(noise.integers(0, 256, (94, 125, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(root / "images" / f"{i:05d}.jpg", quality=90)
    lines = "".join(f"images/{i:05d}.jpg {i % 2}\n" for i in range(images))
    for name in ("train800.txt", "val200.txt"):
        (root / name).write_text(lines)
    return root


def resident_mib(folder: Path, examples: int) -> dict[str, Any]:
    """Largest growth of resident memory, workers included, while every example is shown once."""
    file = make_records(folder / "pictures.tfrecord-00000-of-00001", examples)
    this = psutil.Process()
    before = this.memory_full_info().pss
    source = TfdsSource([FileInstruction(str(file), 0, examples, examples)], "tfrecord", "dsprites_ori", 16)
    split = Split("test", LazyLabels(examples, source.labels), source)
    batches = EvalBatches(split, ImageTransform(64, "vpt"), 256, workers=WORKERS)
    largest = seen = 0
    for number, batch in enumerate(batches):
        seen += int(batch["weight"].sum())
        if number % 10 == 0:
            family = [this, *this.children(recursive=True)]
            largest = max(largest, sum(process.memory_full_info().pss for process in family if process.is_running()))
    batches.close()
    return {"examples": seen, "resident_mib": round((largest - before) / MIB, 1)}


def make_records(file: Path, examples: int) -> Path:
    """A TFRecord file of pictures of 0 and 1, with the label that dSprites has."""
    import crc32c
    from tensorflow_datasets.proto import tf_example_pb2

    def checksum(data: bytes) -> bytes:
        crc = crc32c.crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    noise = np.random.default_rng(0)
    with open(file, "wb") as out:
        for i in range(examples):
            pixels = np.zeros((64, 64), np.uint8)
            top, left = noise.integers(0, 40, 2)
            pixels[top : top + 20, left : left + 20] = 1
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(picture.getvalue())
            example.features.feature["label_orientation"].int64_list.value.append(i % 40)
            raw = example.SerializeToString()
            length = struct.pack("<Q", len(raw))
            out.write(length + checksum(length) + raw + checksum(raw))
    return file


if __name__ == "__main__":
    main()

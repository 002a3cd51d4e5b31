"""Images of one's own, with transparency and EXIF tags: the same in every storage format, and in prediction."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Splits
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.inference.tuned import Tuned

TURNED = 3  # the EXIF orientation of a picture that is upside down
FORMATS = ["image_folder", "vtab_folder", "fgvc_json", "hf", "table", "webdataset"]


def write(root: Path, storage: str) -> None:
    """In each of two classes a transparent PNG with black ink, and a JPEG that is stored upside down."""
    entries: list[tuple[str, int]] = []
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = root / ("" if storage in ("image_folder", "hf") else "images") / split / name
            folder.mkdir(parents=True)
            ink = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
            ink.paste((0, 0, 0, 255), (0, 0, 16, 8))
            ink.save(folder / "ink.png")
            exif = Image.Exif()
            exif[0x0112] = TURNED
            upright = Image.new("RGB", (16, 16), "white")
            upright.paste((0, 0, 0), (0, 0, 16, 8))
            upright.rotate(180).save(folder / "turned.jpg", exif=exif, quality=100)
            entries += [(f"{split}/{name}/{file}", label) for file in ("ink.png", "turned.jpg")]
    of = {split: [(path, label) for path, label in entries if path.startswith(split)] for split in ("train", "test")}
    if storage == "vtab_folder":
        for file, split in (("train800", "train"), ("val200", "train"), ("train800val200", "train"), ("test", "test")):
            (root / f"{file}.txt").write_text("".join(f"{path} {label}\n" for path, label in of[split]))
    if storage == "table":
        for split, rows in of.items():
            lines = (f"{path},{label}\n" for path, label in rows)
            (root / f"{split}.csv").write_text("".join(["path,label\n", *lines]))
    if storage == "webdataset":
        for split, rows in of.items():
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                for number, (path, label) in enumerate(rows):
                    (root / "cls").write_text(str(label))
                    tar.add(root / "cls", f"{number}.cls")
                    tar.add(root / "images" / path, f"{number}{Path(path).suffix}")
    if storage == "fgvc_json":
        for file, split in (("train", "train"), ("val", "train"), ("test", "test")):
            (root / f"{file}.json").write_text(json.dumps(dict(of[split])))


def opened(root: Path, storage: str, **settings: Any) -> tuple[DataConfig, Splits]:
    if storage == "hf":
        pytest.importorskip("datasets")
    if storage != "vtab_folder":
        settings["val_fraction"] = 0.25
    config = DataConfig(task="mine", format=storage, root=str(root), **settings)
    return config, open_splits(config, resolve(config))


def top_and_bottom(picture: Any) -> tuple[int, int]:
    pixels = np.asarray(picture)
    return int(pixels[2, 8, 0]), int(pixels[13, 8, 0])


@pytest.mark.parametrize("storage", FORMATS)
def test_black_ink_on_a_transparent_ground_is_seen_and_pictures_stand_upright(storage: str, tmp_path: Path) -> None:
    write(tmp_path, storage)
    _, splits = opened(tmp_path, storage)
    for i in range(4):  # black above, white below, in both kinds
        assert top_and_bottom(splits["test"].read(i)) == (0, 255), splits["test"].where(i)


@pytest.mark.parametrize("storage", FORMATS)
def test_keys_bring_back_the_published_loaders(storage: str, tmp_path: Path) -> None:
    write(tmp_path, storage)
    _, splits = opened(tmp_path, storage, exif="ignore", background="none")
    found = sorted(top_and_bottom(splits["test"].read(i)) for i in range(4))
    assert found == [(0, 0), (0, 0), (255, 0), (255, 0)]  # the PNGs, the JPEGs


def test_the_background_is_a_key(tmp_path: Path) -> None:
    write(tmp_path, "image_folder")
    _, splits = opened(tmp_path, "image_folder", background="#0a0b0c")
    assert top_and_bottom(splits["test"].read(0)) == (0, 10)


def test_known_tasks_keep_what_their_published_loaders_do() -> None:
    for name in ("dtd", "cub"):
        task = resolve(DataConfig(task=name, root="x"))
        assert (task.exif, task.background) == ("ignore", "none")


def test_prediction_reads_images_as_training_does(tmp_path: Path) -> None:
    write(tmp_path, "image_folder")
    config, splits = opened(tmp_path, "image_folder")
    transform = ImageTransform(image_size=16, interpolation="bilinear")
    inputs: Any = SimpleNamespace(task=resolve(config), transforms=(transform,))
    nothing: Any = torch.nn.Linear(1, 1)
    loaded = Tuned(SimpleNamespace(data=config), nothing, [], inputs)  # type: ignore[arg-type]
    for i in range(4):
        split = splits["test"]
        assert loaded.load_images([Path(split.where(i))])[0].equal(transform.eval(split.read(i)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"background": "brwn"}, "'brwn': must be none, the name of a color or #rrggbb; use white"),
        ({"background": "#00000000"}, "must be none, the name of a color or #rrggbb"),
        ({"format": "tfds", "task": "dtd", "exif": "transpose"}, "exif = transpose: format 'tfds' has its images as"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"task": "mine", "format": "image_folder", "root": "x"} | settings)

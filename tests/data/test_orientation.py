"""The note on published sets with EXIF orientations."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.formats.files import FileSource
from dist_vpt.data.images import Decoding
from dist_vpt.data.orientation import LOOKED_AT, orientation_note
from dist_vpt.data.splits import ArraySource, Split
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.components import build_components


def images(folder: Path, orientations: list[int | None]) -> Split:
    for i, orientation in enumerate(orientations):
        image, exif = Image.new("RGB", (8, 8)), Image.Exif()
        if orientation is not None:
            exif[274] = orientation
        image.save(folder / f"{i}.jpg", exif=exif)
    files = tuple(f"{i}.jpg" for i in range(len(orientations)))
    return Split("trainval", np.zeros(len(files), np.int64), FileSource(folder, files, Decoding()))


def test_turned_images_are_counted(tmp_path: Path) -> None:
    note = orientation_note(images(tmp_path, [None, 1, 0, 3, 6]))
    assert note.startswith(
        "2 of 5 images of trainval that were looked at have an EXIF orientation, which the published"
    )
    assert note.endswith("data.exif=transpose turns them")


@pytest.mark.parametrize("orientations", [[None], [1, 1]])
def test_none_is_no_note(tmp_path: Path, orientations: list[int | None]) -> None:
    assert orientation_note(images(tmp_path, orientations)) == ""


def test_no_more_than_some_are_opened(tmp_path: Path) -> None:
    split = images(tmp_path, [3] * (LOOKED_AT + 50))
    assert orientation_note(split).startswith(f"{LOOKED_AT} of {LOOKED_AT} ")


def test_damaged_files_and_images_without_files_are_passed_over(tmp_path: Path) -> None:
    split = images(tmp_path, [3, 3])
    (tmp_path / "0.jpg").write_bytes(b"no image")
    assert orientation_note(split).startswith("1 of 2 ")
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    assert orientation_note(Split("train", np.zeros(2, np.int64), ArraySource(pixels, "digits"))) == ""


@pytest.mark.parametrize(("exif", "notes"), [("ignore", 1), ("transpose", 0)])
def test_a_published_set_is_noted_before_training(exif: str, notes: int, tmp_path: Path) -> None:
    folder = tmp_path / "kitti"
    (folder / "images").mkdir(parents=True)
    images(folder / "images", [3] * 8)
    for name in ("train800", "val200", "train800val200", "test"):
        (folder / f"{name}.txt").write_text("".join(f"images/{i}.jpg {i % 4}\n" for i in range(8)))
    data = ["data.task=kitti", "data.format=vtab_folder", f"data.root={tmp_path}", "data.check_counts=false"]
    recipe = load_recipe([], [*data, f"data.exif={exif}", "data.image_size=8", "method.name=linear"])
    found = [line for line in build_components(recipe).remarks() if "EXIF" in line]
    assert len(found) == notes

"""Class folders: both layouts and every mistake that is reported."""

import re

import numpy as np
import pytest

from dist_vpt.errors import DataError


def gray(split, i):
    return int(np.asarray(split.read(i))[0, 0, 0])


def refused(opened, message):
    with pytest.raises(DataError) as caught:
        opened("image_folder")
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.fixture
def flat(tmp_path, save_image):
    for label, name in enumerate(("cat", "dog")):
        for i in range(20):
            save_image(tmp_path / name / ("deeper" if i % 2 else "") / f"{i}.png", 100 * label + i)
    return tmp_path


@pytest.fixture
def split(tmp_path, save_image):
    for value, place in enumerate(("train/cat/a.png", "train/dog/b.PNG", "val/dog/c.png", "test/cat/d.png")):
        save_image(tmp_path / place, value)
    return tmp_path


def test_flat_layout_is_carved(flat, opened):
    splits = opened("image_folder", val_fraction=0.1, test_fraction=0.2)
    assert splits.classes == ("cat", "dog")
    parts = {name: [gray(splits[name], i) for i in range(len(splits[name]))] for name in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [28, 4, 8]
    assert sorted(value for part in parts.values() for value in part) == [*range(20), *range(100, 120)]
    for name, part in parts.items():
        assert splits[name].labels.tolist() == [value // 100 for value in part]
        assert np.bincount(splits[name].labels).tolist() == [len(part) // 2] * 2
    assert len(splits.trainval) == 32


def test_carving_follows_the_seed(flat, opened):
    def names(seed):
        val = opened("image_folder", split_seed=seed).val
        return [val.where(i) for i in range(len(val))]

    assert names(0) == names(0)
    assert names(0) != names(1)


def test_split_layout(split, opened):
    splits = opened("image_folder")
    assert [[gray(splits[n], i) for i in range(len(splits[n]))] for n in ("train", "val", "trainval", "test")] == [
        [0, 1],
        [2],
        [0, 1, 2],
        [3],
    ]
    assert splits.val.labels.tolist() == [1]
    assert splits.test.labels.tolist() == [0]
    assert splits.train.where(0) == str(split / "train/cat/a.png")


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_val_has_other_names(split, opened, name):
    (split / "val").rename(split / name)
    assert [gray(opened("image_folder").val, 0)] == [2]


def test_no_test_folder(split, opened, save_image):
    (split / "test").rename(split / ".hidden")
    with pytest.raises(DataError, match=r"'test' is missing: there is no folder .*test; add it, with a folder for"):
        opened("image_folder")["test"]


def test_class_may_be_called_train(flat, opened):
    (flat / "dog").rename(flat / "train")
    for image in (flat / "train/deeper").iterdir():
        image.rename(flat / "train" / image.name)
    (flat / "train/deeper").rmdir()
    assert opened("image_folder").classes == ("cat", "train")


def test_hidden_and_foreign_files_are_passed_over(flat, opened):
    for name in ("cat/.DS_Store", "cat/._0.png", "cat/notes.txt", "readme.md"):
        (flat / name).write_text("x")
    (flat / ".cache").mkdir()
    splits = opened("image_folder")
    assert sum(len(splits[name]) for name in ("train", "val", "test")) == 40
    assert splits.classes == ("cat", "dog")


def test_empty_class_folder(flat, opened):
    (flat / "eel").mkdir()
    (flat / "eel/notes.txt").write_text("x")
    refused(opened, "eel: holds no image; add images or remove the folder")


def test_no_class_folder(tmp_path, opened):
    refused(opened, "has no class folders; give each class a folder of images")


def test_class_that_train_lacks(split, opened):
    (split / "val/dog").rename(split / "val/dogs")
    refused(opened, r"val/dogs: class 'dogs' has no folder in train; did you mean 'dog'\?")


def test_split_folders_without_train(split, opened):
    (split / "train").rename(split / "training")
    refused(opened, "has .*val, .*test but no folder .*train of class folders; add it")


def test_images_stand_upright(flat, opened):
    from PIL import Image

    path = flat / "cat/0.png"
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned
    image.save(path, exif=exif)
    splits = opened("image_folder")
    sizes = {
        splits[name].where(i): splits[name].read(i).size
        for name in ("trainval", "test")
        for i in range(len(splits[name]))
    }
    assert sizes[str(path)] == (10, 12)
    assert sizes[str(flat / "cat/2.png")] == (12, 10)

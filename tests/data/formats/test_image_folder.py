"""Class folders: both layouts and every mistake that is reported."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.formats import files, open_splits
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


@pytest.mark.parametrize(
    ("name", "other"),
    [("train", "Training"), ("train", "train_set"), ("train", "TRAIN2017"), ("val", "Valid"), ("val", "validation"),
     ("val", "dev"), ("test", "Testing"), ("test", "test-images")],
)  # fmt: skip
def test_splits_have_other_names(split, opened, name, other):
    (split / name).rename(split / other)
    splits = opened("image_folder")
    assert [[gray(splits[n], i) for i in range(len(splits[n]))] for n in ("train", "val", "test")] == [[0, 1], [2], [3]]


def test_two_folders_for_one_split(split, opened, save_image):
    save_image(split / "Dev/cat/x.png", 1)
    refused(opened, "Dev and val could both be the split 'val'; rename all but one")


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_split_folder_without_class_folders(split, opened, name):
    for i, image in enumerate(list((split / name).rglob("*.*"))):
        image.rename(split / name / f"{i}.png")
        image.parent.rmdir()
    refused(opened, rf"{name}: is named like a split and holds [12] images but no class folders; move each image into")


def test_a_test_folder_without_class_folders_is_refused_where_test_is_needed(split, opened):
    (split / "test/cat/d.png").rename(split / "test/d.png")
    (split / "test/cat").rmdir()
    splits = opened("image_folder")
    assert len(splits.train) == 2
    with pytest.raises(DataError, match=r"test: is named like .* holds 1 images .*, or set train.test=false"):
        splits["test"]


def test_classes_that_look_like_splits(tmp_path, opened, save_image):
    for name in ("Training", "Testing", "cat"):
        save_image(tmp_path / name / "x.png")
    refused(opened, "Training: is named like a split and holds 1 images but no class folders")


def test_folders_beside_the_splits_are_named(split, opened, save_image):
    save_image(split / "extra/cat/x.png", 1)
    assert opened("image_folder").remarks == (f"{split}: folders beside the splits are not read: extra",)


def test_a_class_named_like_a_split_whose_images_lie_deeper(tmp_path, opened, save_image):
    """Or a split beside images of no class: both are possible, and neither is taken for the other."""
    for i in range(20):
        save_image(tmp_path / "car" / f"{i}.png", i)
        save_image(tmp_path / "train" / ("steam", "diesel")[i % 2] / f"{i}.png", i)
    refused(
        opened, "train: is named like a split, and .*car beside it holds images; move the class folders into it, or"
    )


@pytest.mark.parametrize("layout", ["", "train"])
def test_one_class(tmp_path, opened, save_image, layout):
    for i in range(20):
        save_image(tmp_path / layout / "cat" / f"{i}.png", i)
    refused(opened, "has one class only, 'cat'; is data.root a folder too high or too low?")


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


def test_folders_of_other_programs_are_passed_over_at_every_depth(flat, opened, save_image):
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "deeper/.thumbs/x"):
        save_image(flat / "cat" / folder / "copy.png", 1)
    save_image(flat / "__MACOSX" / "cat" / "x.png")
    splits = opened("image_folder")
    assert splits.classes == ("cat", "dog")
    assert sum(len(splits[name]) for name in ("train", "val", "test")) == 40


def test_files_that_are_no_images_are_counted(flat, opened):
    for i in range(3):
        (flat / "cat" / f"{i}.json").write_text("{}")
    (flat / "dog" / "LICENSE").write_text("x")
    [line] = opened("image_folder").remarks
    assert line == f"{flat}: files without the extension of an image are not read: 3 .json, 1 without extension"


@pytest.mark.parametrize("extension", ["avif", "JFIF", "jp2", "tga", "BMP", "mpo"])
def test_all_formats_that_pillow_reads(flat, opened, extension):
    image = Image.new("RGB", (12, 10), "red")
    kind = {"JFIF": "JPEG", "jp2": "JPEG2000"}.get(extension, extension.upper())
    for i in range(20):
        image.save(flat / "cat" / f"x{i}.{extension}", kind)
    splits = opened("image_folder")
    files = [splits[n].where(i) for n in ("trainval", "test") for i in range(len(splits[n]))]
    assert sum(file.endswith(extension) for file in files) == 20


def test_a_folder_is_entered_once(flat, opened):
    (flat / "cat" / "loop").symlink_to(flat / "cat", target_is_directory=True)
    (flat / "cat" / "again").symlink_to(flat / "cat" / "deeper", target_is_directory=True)
    splits = opened("image_folder")
    assert sum(len(splits[name]) for name in ("train", "val", "test")) == 40


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("train_dataset", "test_dataset"), ("x-train", "x-val")])
def test_names_that_hold_a_split_among_other_words(tmp_path, opened, save_image, names):
    for name in names:
        for i, class_name in enumerate(("cat", "dog")):
            for k in range(20):
                save_image(tmp_path / name / class_name / f"{k}.png", 100 * i + k)
    splits = opened("image_folder")
    assert splits.classes == ("cat", "dog")
    assert len(splits["test"] if "test" in names[1] else splits["val"]) == 40
    assert splits.remarks == ()


def test_classes_whose_names_hold_a_split_among_other_words(tmp_path, opened, save_image):
    for name in ("steam_train", "test_tube"):
        for i in range(20):
            save_image(tmp_path / name / f"{i}.png", i)
    assert opened("image_folder").classes == ("steam_train", "test_tube")


def test_a_folder_of_another_class_is_not_read_through_a_link(flat, opened):
    (flat / "cat" / "up").symlink_to(flat, target_is_directory=True)
    (flat / "cat" / "more").symlink_to(flat / "dog", target_is_directory=True)
    splits = opened("image_folder")
    assert sum(len(splits[name]) for name in ("train", "val", "test")) == 40


def test_links_that_lead_nowhere_and_special_files(flat, opened):
    (flat / "loop").symlink_to(flat / "loop")
    os.mkfifo(flat / "cat" / "pipe.png")
    splits = opened("image_folder")
    assert splits.classes == ("cat", "dog")
    assert "1 special files .png" in splits.remarks[0]
    (flat / "cat" / "gone.png").symlink_to(flat / "nix.png")
    splits = opened("image_folder")
    [at] = [(n, i) for n in ("trainval", "test") for i in range(len(splits[n])) if "gone" in splits[n].where(i)]
    assert "missing" in splits[at[0]].source.identity(at[1])
    with pytest.raises(DataError, match=r"gone.png: there is no such image"):
        splits[at[0]].read(at[1])


@pytest.mark.parametrize("folder", ["", "cat", "cat/deeper"])
def test_a_folder_that_cannot_be_read(flat, opened, folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if Path(path) == flat / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(opened, r"cannot be read \(Permission denied\)")


@pytest.mark.parametrize("root", ["~no-such-user/x", "x" * 300])
def test_a_root_that_cannot_exist(root):
    config = DataConfig(task="mine", format="image_folder", root=root)
    with pytest.raises(DataError, match=r"^data\.root .*: cannot be read \("):
        open_splits(config, resolve(config))


def test_images_beside_the_class_folders_are_counted(split, opened, save_image):
    save_image(split / "a.png")
    save_image(split / "train" / "b.PNG")
    save_image(split / "train" / "c.png")
    assert opened("image_folder").remarks == (
        f"{split}: 1 images beside the class folders are not read",
        f"{split / 'train'}: 2 images beside the class folders are not read",
    )


def test_heic_names_the_plugin(flat, opened, monkeypatch):
    monkeypatch.setattr(files, "image_extensions", lambda: frozenset({".png"}))
    (flat / "eel").mkdir()
    (flat / "eel/a.HEIC").write_bytes(b"x")
    refused(opened, r"eel: holds no image \(1 .heic; pip install pillow-heif reads HEIC\); add images or remove")


def test_empty_class_folder(flat, opened):
    (flat / "eel").mkdir()
    (flat / "eel/notes.txt").write_text("x")
    refused(opened, r"eel: holds no image \(1 .txt\); add images or remove the folder")


def test_no_class_folder(tmp_path, opened):
    refused(opened, "has no class folders; give each class a folder of images")


def test_class_that_train_lacks(split, opened):
    (split / "val/dog").rename(split / "val/dogs")
    refused(opened, r"val/dogs: class 'dogs' has no folder in train; did you mean 'dog'\?")


def test_split_folders_without_train(split, opened):
    (split / "train").rename(split / "first")
    refused(opened, "has .*val, .*test but no folder .*train of class folders; add it")


def test_images_stand_upright(flat, opened):
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


def test_names_that_are_not_utf8_are_escaped(flat, opened):
    (flat / "dog").rename(Path(os.fsdecode(os.fsencode(flat) + b"/caf\xe9\n")))
    splits = opened("image_folder")
    assert splits.classes == ("caf\\xe9\\n", "cat")
    assert {splits["test"].where(i).isascii() for i in range(8)} == {True}
    assert len({gray(splits["test"], i) for i in range(8)}) == 8


def test_class_folders_of_a_split_may_differ_in_case_or_in_how_accents_are_stored(split, opened, save_image):
    (split / "val/dog").rename(split / "val/Dog")
    for place, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        save_image(split / place / name / "x.png", 9)
    splits = opened("image_folder")
    assert splits.val.labels.tolist() == [splits.classes.index("dog")]
    assert splits.test.labels.tolist().count(splits.classes.index("caf\u00e9")) == 1


def test_a_root_that_is_an_address():
    config = DataConfig(task="mine", format="image_folder", root="https://host/pictures")
    with pytest.raises(DataError, match=r"data.root 'https://host/pictures': is an address, which only data.format="):
        open_splits(config, resolve(config))

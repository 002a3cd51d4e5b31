"""Files with the same bytes in several splits or classes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.data import duplicates
from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.duplicates import equal_files, leak_warning, repeats
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Splits
from tests.running import train


def opened(folders: Path) -> Splits:
    config = DataConfig(task="mine", format="image_folder", root=str(folders))
    return open_splits(config, resolve(config))


def test_different_files_are_not_grouped_and_few_are_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = duplicates._digest
    read: list[Path] = []
    monkeypatch.setattr(duplicates, "_digest", lambda path: read.append(path) or whole(path))  # type: ignore[func-returns-value]
    splits = opened(folders)
    assert not equal_files((splits.trainval, splits["test"]))
    assert not read
    shutil.copy(folders / "train/cat/3.png", folders / "test/cat/copy.png")
    splits = opened(folders)
    assert len(equal_files((splits.trainval, splits["test"]))) == 1
    assert sorted(read) == [folders / "test/cat/copy.png", folders / "train/cat/3.png"]


def test_equal_ends_alone_are_no_duplicates(folders: Path) -> None:
    for split, first in (("train", b"a"), ("test", b"b")):
        (folders / split / "cat" / "x.png").write_bytes(first + bytes(duplicates.TAIL_BYTES))
    splits = opened(folders)
    assert not equal_files((splits.trainval, splits["test"]))


def test_files_of_test_that_are_trained_on(folders: Path) -> None:
    shutil.copy(folders / "train/cat/3.png", folders / "test/cat/copy.png")
    shutil.copy(folders / "val/dog/1.png", folders / "test/dog/other.png")
    splits = opened(folders)
    warning = leak_warning(splits.trainval, splits["test"])
    assert warning.startswith("2 files of test can be trained on too, byte for byte, such as ")
    assert f"{folders}/test/cat/copy.png = {folders}/train/cat/3.png" in warning
    groups = equal_files([splits.train, splits["test"]])
    assert [[(place.split, place.label) for place in group] for group in groups] == [[("train", 0), ("test", 0)]]


def test_split_off_images_have_their_files_too(tmp_path: Path, save_image: Any) -> None:
    for name in ("cat", "dog"):
        for i in range(20):
            save_image(tmp_path / name / f"{i}.png", 5)  # all alike
    splits = opened(tmp_path)
    assert leak_warning(splits.trainval, splits["test"]).startswith("8 files of test")


def test_images_that_are_no_files_are_passed_over() -> None:
    config = DataConfig()
    splits = open_splits(config, resolve(config))
    assert not equal_files((splits.train, splits["test"]))


def test_a_run_warns_unless_the_key_says_no(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(folders / "train/cat/3.png", folders / "test/cat/copy.png")
    own = ("data.task=mine", "data.format=image_folder", f"data.root={folders}", "train.batch_size=6", "train.epochs=1")
    train(tmp_path / "runs/run", *own)
    log = (tmp_path / "runs/run/train.log").read_text()
    assert log.count("warning: 1 file of test can be trained on too, byte for byte, such as ") == 1
    monkeypatch.setattr(duplicates, "equal_files", None)
    train(tmp_path / "runs/off", *own, "data.check_leaks=false")
    assert "byte for byte" not in (tmp_path / "runs/off/train.log").read_text()


def test_lists_that_name_a_file_twice(tmp_path: Path, save_image: Any) -> None:
    for name in "abcdefg":
        save_image(tmp_path / f"images/{name}.png", ord(name))
    lists = {
        "train800": "a.png 0\nimages/a.png 0\nb.png 1\n",  # one file by two names
        "val200": "b.png 1\nc.png 0\n",
        "test": "d.png 0\nd.png 0\ne.png 1\ne.png 1\nf.png 1\nf.png 1\ng.png 0\ng.png 0\n",
    }
    for name, text in lists.items():
        (tmp_path / f"{name}.txt").write_text(text)
    config = DataConfig(task="mine", format="vtab_folder", root=str(tmp_path))
    splits = open_splits(config, resolve(config))
    images = f"{tmp_path}/images"
    assert repeats(splits.train, splits.val, splits.test) == [
        f"1 file ({images}/a.png) is in train more than once, and each entry counts; remove the others",
        f"4 files ({images}/d.png, {images}/e.png, {images}/f.png, ...) are in test more than once, and each entry "
        "counts; remove the others",
        f"1 file ({images}/b.png) is in train and in val, so val scores are too high while train alone is trained on; "
        "remove them from one of the splits",
    ]


def test_nothing_is_said_of_files_named_once(folders: Path) -> None:
    splits = opened(folders)
    assert repeats(splits.train, splits.val, splits.test) == []

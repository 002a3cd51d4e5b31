"""Extra test sets: found in folders, with their classes' numbers in the task; mistakes are named early."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import check_root, open_splits
from dist_vpt.data.formats.extra_tests import classes_in, mean_scores
from dist_vpt.data.splits import Splits
from dist_vpt.errors import DataError


def fill(root: Path, *names: str, count: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four classes."""
    return fill(tmp_path / "data", "cat", "dog", "Eule", "fox", count=10)


def opened(data: Path, **folders: Path) -> Splits:
    extra = {name.replace("_", "-"): str(folder) for name, folder in folders.items()}
    return open_splits(DataConfig(task="mine", format="image_folder", root=str(data), extra_tests=extra))


def test_some_classes_keep_their_numbers(data: Path, tmp_path: Path) -> None:
    splits = opened(data, r=fill(tmp_path / "r", "fox", "eule"))
    split = splits["r"]
    assert [splits.classes[k] for k in split.labels] == ["Eule", "Eule", "fox", "fox"]
    assert [Path(split.where(i)).name for i in range(4)] == ["0.png", "1.png"] * 2
    assert classes_in(split, 4).tolist() == [name in ("Eule", "fox") for name in splits.classes]
    assert splits.remarks == ("extra test r: has 2 of 4 classes, and predictions are made among these",)
    assert np.asarray(split.read(1)).tolist() == np.asarray(Image.open(tmp_path / "r" / "eule" / "1.png")).tolist()


def test_all_classes_and_other_formats(tmp_path: Path) -> None:
    folder = fill(tmp_path / "more", *"0123456789")
    splits = open_splits(DataConfig(extra_tests={"more": str(folder)}))  # digits
    assert splits["more"].labels.tolist() == sorted([*range(10)] * 2)
    assert not splits.remarks


def test_sets_in_folders(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "c"
    for name in ("fog/1", "fog/2", "snow/1"):
        fill(root / name, "cat", "dog")
    splits = opened(data, c=root, flat=fill(tmp_path / "flat" / "val", "cat").parent)
    assert list(splits.extra) == ["c/fog/1", "c/fog/2", "c/snow/1", "flat/val"]
    assert all(split.name == name for name, split in splits.extra.items())


def test_sets_whose_folders_are_called_as_classes(tmp_path: Path) -> None:
    for name in ("fog/1", "fog/2"):
        fill(tmp_path / "c" / name, "0", "1", "2")
    fill(tmp_path / "deep", "0/a", "1/b")  # classes with folders in them
    extra = {"c": str(tmp_path / "c"), "fog": str(tmp_path / "c" / "fog"), "deep": str(tmp_path / "deep")}
    splits = open_splits(DataConfig(extra_tests=extra))  # digits
    assert list(splits.extra) == ["c/fog/1", "c/fog/2", "fog/1", "fog/2", "deep"]
    assert splits["fog/2"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert splits["deep"].labels.tolist() == [0, 0, 1, 1]


def test_means_over_sets() -> None:
    scores: dict[str, dict[str, float | None]] = {
        "r": {"top1": 7.0},
        "c/fog/1": {"top1": 10.0, "ece_scaled": None},
        "c/fog/2": {"top1": 40.0, "ece_scaled": 3.0},
    }
    assert mean_scores(scores) == {"c": {"top1": 25.0}, **scores}


def test_mistakes(data: Path, tmp_path: Path) -> None:
    def refused(text: str, **folders: Path) -> None:
        with pytest.raises(DataError, match=text):
            opened(data, **folders)

    refused("data.extra_tests.r '.*none': is not a folder; use one with a folder a class", r=tmp_path / "none")
    refused("(?s)extra_tests.a .*extra_tests.b ", a=tmp_path / "none", b=tmp_path / "neither")
    refused("class 'foxx' is no class of mine; did you mean 'fox'?", r=fill(tmp_path / "r", "foxx", "dog"))
    refused("class 'bird' is no class of mine; valid: Eule, cat, dog, fox", r=fill(tmp_path / "s", "bird"))
    (tmp_path / "empty").mkdir()
    refused("data.extra_tests.e '.*empty': has no class folders; give each class a folder", e=tmp_path / "empty")
    (tmp_path / "t" / "cat").mkdir(parents=True)
    refused("t/cat: holds no image; add images or remove the folder", t=tmp_path / "t")
    fill(tmp_path, "loose")
    refused("'.*loose': has no class folders", a=tmp_path / "loose")


def test_a_missing_folder_is_named_at_once(data: Path, tmp_path: Path) -> None:
    config = DataConfig(task="mine", format="image_folder", root=str(data), extra_tests={"r": str(tmp_path / "none")})
    with pytest.raises(DataError, match=r"data.extra_tests.r '.*none': is not a folder"):
        check_root(config, test=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(data: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "r", "cat")
    folder.chmod(0)
    try:
        with pytest.raises(DataError, match="cannot be read"):
            opened(data, r=folder)
    finally:
        folder.chmod(0o755)

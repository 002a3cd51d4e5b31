"""Few shots and fractions: the same draw from every storage format, seeded, nested, stratified; test stays whole."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Split, Splits, first_of_each_class
from dist_vpt.errors import DataError
from tests.data import tfds_copies

Open = Callable[..., Splits]  # keys of the data section -> splits
CLASSES, EACH = 3, {"train": 12, "val": 6, "test": 5}  # of the small datasets; images of a class


def records(split: Split | None) -> list[str]:
    return [] if split is None else [split.where(i) for i in range(len(split))]


def of_each(split: Split, classes: int) -> list[int]:
    return np.bincount(split.labels, minlength=classes).tolist()


def image_folder(root: Path, save: Callable[..., Path]) -> None:
    for split, count in EACH.items():
        for k in range(CLASSES):
            for i in range(count):
                save(root / split / "abc"[k] / f"{i}.png", 20 * k + i)


def fgvc_json(root: Path, save: Callable[..., Path]) -> None:
    for split, count in EACH.items():
        entries = {f"{split}-{k}-{i}.png": k for i in range(count) for k in range(CLASSES)}
        for path in entries:
            save(root / "images" / path)
        (root / f"{split}.json").write_text(json.dumps(entries))


def vtab_folder(root: Path, save: Callable[..., Path]) -> None:
    lines = {
        split: [f"images/{split}-{k}-{i}.png {k}\n" for i in range(count) for k in range(CLASSES)]
        for split, count in EACH.items()
    }
    for line in (line for kept in lines.values() for line in kept):
        save(root / line.split()[0])
    lists = {"train800": lines["train"], "val200": lines["val"], "test": lines["test"]}
    for name, kept in (lists | {"train800val200": lines["train"] + lines["val"]}).items():
        (root / f"{name}.txt").write_text("".join(kept))


def hf(root: Path, save: Callable[..., Path]) -> None:
    image_folder(root, save)


def table(root: Path, save: Callable[..., Path]) -> None:
    lines = ["path,label,split"]
    for split, count in EACH.items():
        for path, k in ((f"{split}-{k}-{i}.png", k) for i in range(count) for k in range(CLASSES)):
            save(root / path)
            lines.append(f"{path},{k},{split}")
    (root / "labels.csv").write_text("\n".join(lines))


def webdataset(root: Path, save: Callable[..., Path]) -> None:
    for split, count in EACH.items():
        root.mkdir(exist_ok=True)
        with tarfile.open(root / f"{split}-0.tar", "w") as tar:
            for k, i in ((k, i) for i in range(count) for k in range(CLASSES)):
                image = save(root / f"{k}-{i}.png")
                tar.add(image, image.name)
                image.with_suffix(".cls").write_text(str(k))
                tar.add(image.with_suffix(".cls"), f"{k}-{i}.cls")


FORMATS = {
    "image_folder": image_folder,
    "fgvc_json": fgvc_json,
    "vtab_folder": vtab_folder,
    "hf": hf,
    "table": table,
    "webdataset": webdataset,
}
TASKS = {"digits": 10, "shapes_ori": 16, "shapes_loc": 16}


@pytest.fixture(params=[*FORMATS, *TASKS, "tfds"])
def dataset(
    request: pytest.FixtureRequest, tmp_path: Path, save_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Open:
    """A dataset in each storage format."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    name, root = request.param, tmp_path / "data"
    keys: dict[str, object] = {"task": name} if name in TASKS else {"task": "mine", "format": name, "root": str(root)}
    if name == "tfds":
        tfds_copies.prepare(root, ("eurosat/rgb",))
        keys = {"task": "eurosat", "root": str(root), "check_counts": False}
    elif name in FORMATS:
        FORMATS[name](root, save_image)
    return lambda **more: open_splits(DataConfig(**(keys | more)))


def test_shots_are_drawn_from_every_format(dataset: Open) -> None:
    whole, three, other = dataset(), dataset(shots=3), dataset(shots=3, try_index=1)
    classes = len(whole.classes)
    assert three.classes == whole.classes
    assert of_each(three.train, classes) == [3] * classes
    assert whole.val is not None
    assert three.val is not None
    assert of_each(three.val, classes) == [min(3, count) for count in of_each(whole.val, classes)]
    assert records(three.test) == records(whole.test)
    assert records(three.trainval) == records(three.train) + records(three.val)
    labels = dict(zip(records(whole.trainval), whole.trainval.labels, strict=True))
    for split in (three.train, three.val):
        assert [labels[record] for record in records(split)] == split.labels.tolist()
        assert np.asarray(split.read(0)).ndim == 3
    assert set(records(three.train)) < set(records(whole.train))
    assert records(dataset(shots=3).train) == records(three.train)
    assert records(other.train) != records(three.train)
    assert set(records(dataset(shots=2).train)) < set(records(three.train))  # nested
    assert records(dataset(shots=3, split_seed=5).train) != records(three.train)
    assert (three.drawn, whole.drawn) == (("train", "val"), ())


def test_a_fraction_is_drawn_from_every_format(dataset: Open) -> None:
    whole, half, other = dataset(), dataset(fraction=0.5), dataset(fraction=0.5, try_index=1)
    classes = len(whole.classes)
    assert len(half.train) == len(whole.train) // 2
    differences = np.array(of_each(half.train, classes)) - np.array(of_each(whole.train, classes)) / 2
    assert abs(differences).max() <= 1
    assert records(half.val) == records(whole.val)
    assert records(half.test) == records(whole.test)
    assert records(half.trainval) == records(half.train) + records(half.val)
    assert records(half.train) != records(other.train)
    assert half.drawn == ("train",)


def test_no_more_than_four_of_val(folders: Path, opened: Open) -> None:
    for shots, val in ((1, 1), (4, 4), (6, 4)):
        splits = opened("image_folder", shots=shots)
        assert splits.val is not None
        assert of_each(splits.val, 2) == [val, val]
        assert of_each(splits.train, 2) == [shots, shots]


def test_a_draw_is_even_and_pinned() -> None:
    labels = np.array([2, 0, 1, 0, 2, 2, 0, 1, 0, 2])
    rows = first_of_each_class(labels, 2, 0, 0)
    assert rows.tolist() == sorted(rows) == [0, 1, 2, 3, 4, 7]
    taken = np.zeros(10)
    for key in range(400):
        taken[first_of_each_class(labels, 1, key, 3)] += 1
    assert taken.sum() == 3 * 400
    for k in range(3):
        expected = 400 / (labels == k).sum()
        assert abs(taken[labels == k] - expected).max() < 4 * expected**0.5
    assert first_of_each_class(labels, 9, 0).tolist() == list(range(10))


def test_too_many_shots_name_the_class(folders: Path, opened: Open) -> None:
    for i in (4, 5):
        (folders / "train" / "dog" / f"{i}.png").unlink()
    message = r"^data.shots 5: class 'dog' has 4 images in train; use data.shots=4 or less, or add images$"
    with pytest.raises(DataError, match=message):
        opened("image_folder", shots=5)
    with pytest.raises(DataError, match=r"shots 9: class 'dog' has 4 images in train, and 1 other class has too few"):
        opened("image_folder", shots=9)


def test_a_class_without_images_has_no_shots(tmp_path: Path, save_image: Callable[..., Path], opened: Open) -> None:
    vtab_folder(tmp_path, save_image)
    lines = [line for line in (tmp_path / "train800.txt").read_text().splitlines() if line[-1] != "1"]
    (tmp_path / "train800.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"shots 1: class '1' has 0 images in train; use data.fraction, or add images"):
        opened("vtab_folder", shots=1, absent_classes="allow")


def test_a_fraction_that_leaves_a_class_without_images(folders: Path, opened: Open) -> None:
    message = r"^data.fraction 0.1: 1 of 12 images of train leave some of 2 classes without any; use 0.167 or more$"
    with pytest.raises(DataError, match=message):
        opened("image_folder", fraction=0.1)
    assert of_each(opened("image_folder", fraction=0.167).train, 2) == [1, 1]


def test_a_file_of_a_fraction_is_one_draw(tmp_path: Path, save_image: Callable[..., Path], opened: Open) -> None:
    fgvc_json(tmp_path, save_image)
    (tmp_path / "train_25.json").write_text(json.dumps({f"train-{k}-0.png": k for k in range(CLASSES)}))
    splits = opened("fgvc_json", fraction=0.25)
    assert (len(splits.train), splits.drawn) == (3, ())
    for more in ({"tries": 2}, {"try_index": 1}):
        with pytest.raises(DataError, match=r"train_25.json: is one draw of data.fraction 0.25, and every try would"):
            opened("fgvc_json", fraction=0.25, **more)


def test_one_class_is_refused_before_the_draw(tmp_path: Path, save_image: Callable[..., Path], opened: Open) -> None:
    for split in ("train", "val", "test"):
        save_image(tmp_path / split / "cat" / "0.png")
    with pytest.raises(DataError, match="has one class only, 'cat'"):
        opened("image_folder", shots=3)

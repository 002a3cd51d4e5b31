"""FGVC folders: what is read and every mistake that is reported."""

import json
import re

import numpy as np
import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.formats.files import Folder
from dist_vpt.data.images import AS_PUBLISHED
from dist_vpt.errors import DataError


def gray(split, i):
    return int(np.asarray(split.read(i))[0, 0, 0])


@pytest.fixture
def write(tmp_path, save_image):
    """Writes the json files and an image for each of their paths."""

    def write_all(below="images", **splits):
        for name, entries in splits.items():
            for value, path in enumerate(entries):
                save_image(tmp_path / below / path, value)
            (tmp_path / f"{name}.json").write_text(json.dumps(entries))

    return write_all


def refused(opened, message):
    with pytest.raises(DataError) as caught:
        opened("fgvc_json")
    assert re.search(message, str(caught.value)), str(caught.value)


TRAIN = {"x/a.png": 10, "x/b.png": 9, "y/c.png": 200}


@pytest.mark.parametrize("below", ["", "images", "Images"])
def test_labels_are_ranked_on_train_for_every_split(write, opened, below):
    write(below, train=TRAIN, val={"v.png": 200}, test={"t.png": 10, "u.png": 200})
    splits = opened("fgvc_json")
    assert splits.classes == ("9", "10", "200")
    assert splits.train.labels.tolist() == [1, 0, 2]
    assert splits.val.labels.tolist() == [2]
    assert splits.test.labels.tolist() == [1, 2]
    assert splits.trainval.labels.tolist() == [1, 0, 2, 2]
    assert [gray(splits.train, i) for i in range(3)] == [0, 1, 2]


def test_ids_may_be_text(write, opened):
    write(train={"a.png": "wren", "b.png": "owl"}, val={"c.png": "wren"}, test={"d.png": "owl"})
    splits = opened("fgvc_json")
    assert splits.classes == ("owl", "wren")
    assert splits.test.labels.tolist() == [0]


def test_val_is_carved_where_it_is_missing(write, opened):
    train = {f"{i}.png": i % 2 for i in range(40)}
    write(train=train, test={"0.png": 0})
    splits = opened("fgvc_json", val_fraction=0.2)
    assert (len(splits.train), len(splits.val), len(splits.trainval)) == (32, 8, 40)
    assert np.bincount(splits.val.labels).tolist() == [4, 4]
    names = [{split.where(i) for i in range(len(split))} for split in (splits.train, splits.val)]
    assert not names[0] & names[1]
    other = opened("fgvc_json", val_fraction=0.2, split_seed=1).val
    assert {other.where(i) for i in range(8)} != names[1]


def test_test_is_needed_only_when_asked_for(write, opened):
    write(train=TRAIN, val={"v.png": 200})
    with pytest.raises(DataError, match=r"'test' is missing: there is no .*test\.json; add it"):
        opened("fgvc_json")["test"]


def test_train_is_needed(write, opened):
    write(test=TRAIN)
    refused(opened, r"train\.json: there is no such file, and the format needs it; add it")


def test_id_without_a_training_image(write, opened):
    write(train=TRAIN, val={"v.png": 20})
    refused(opened, r"val\.json: 'v.png': class id 20 has no image in train; did you mean '200'\?")


@pytest.mark.parametrize("value", [1.5, None, True, [1], {"a": 1}])
def test_id_that_is_no_id(write, opened, value):
    write(train={"a.png": value})
    refused(opened, r"train\.json: 'a.png': class id .* is neither a whole number nor text; use one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.png": 1,\n "b.png" 2}', r"train\.json:2: is not JSON \(Expecting ':' delimiter\); fix the syntax"),
        ("[1]", "holds a list; use an object of 'relative.path': class id"),
        ("3", "holds a int; use an object"),
        ("{}", "train.json: holds no image; add a 'relative/path': class id"),
        ('{"a.png": 1, "a.png": 2}', "train.json: 'a.png': occurs twice; remove one"),
        ('{"gone.png": 1}', "train.json: 'gone.png': there is no file 'gone.png' in .*; restore it"),
        ('{"": 1}', "train.json: '': there is no file ''"),
        ('{"../a.png": 1}', "train.json: '../a.png': path '../a.png' leaves the dataset's folder"),
    ],
)
def test_bad_file(write, opened, tmp_path, text, message):
    write(val={"a.png": 1})
    (tmp_path / "train.json").write_text(text)
    refused(opened, message)


def test_a_fraction_is_that_of_its_own_file(write, opened):
    write(train={f"{i}.png": i % 4 for i in range(40)}, train_50={"0.png": 0, "1.png": 1, "2.png": 2, "7.png": 3},
          val={"v.png": 0}, test={"t.png": 3})  # fmt: skip
    splits = opened("fgvc_json", fraction=0.5)
    assert splits.train.labels.tolist() == [0, 1, 2, 3]
    assert len(splits.trainval) == 5
    assert len(opened("fgvc_json").train) == 40


def test_a_fraction_without_a_file_is_carved(write, opened):
    write(train={f"{i}.png": i % 4 for i in range(40)}, val={"v.png": 0}, test={"t.png": 3})
    found = opened("fgvc_json", fraction=0.1, split_seed=3).train
    assert sorted(found.labels.tolist()) == [0, 1, 2, 3]  # 4 of 40, each class in proportion
    again = opened("fgvc_json", fraction=0.1, split_seed=3).train
    assert [found.where(i) for i in range(4)] == [again.where(i) for i in range(4)]
    other = opened("fgvc_json", fraction=0.1, split_seed=4).train
    assert [found.where(i) for i in range(4)] != [other.where(i) for i in range(4)]
    assert len(opened("fgvc_json", fraction=0.5).train) == 20


@pytest.mark.parametrize("name", ["CUB_200_2011", "cub", "Cub"])
def test_a_known_sets_folder_is_found_below_the_root(name, tmp_path, save_image):
    home = tmp_path / name
    train = {f"{i}.png": i + 1 for i in range(200)}
    for path in (*train, "t.png"):
        save_image(home / "images" / path)
    (home / "train.json").write_text(json.dumps(train))
    (home / "val.json").write_text(json.dumps({"0.png": 1}))
    (home / "test.json").write_text(json.dumps({"t.png": 200}))
    splits = open_splits(DataConfig(task="cub", root=str(tmp_path), check_counts=False))
    assert len(splits.classes) == 200
    assert splits.test.labels.tolist() == [199]
    with pytest.raises(DataError, match="split 'test' of task 'cub': 1 images, and the published one has 5,794"):
        open_splits(DataConfig(task="cub", root=str(tmp_path)))


@pytest.mark.parametrize(
    "written", ["cat\\a.png", "cat/A.PNG", "Cat/a.png", ".\\Cat\\A.png", "./cat/a.png", "images\\CAT\\a.png"]
)
def test_paths_as_other_systems_write_them(written, tmp_path, save_image):
    save_image(tmp_path / "images/cat/a.png", 7)
    folder = Folder(tmp_path, ("", "images"), AS_PUBLISHED)
    assert folder.find(written) == "images/cat/a.png"


def test_accents_composed_or_not(tmp_path, save_image):
    composed, apart = "caf\u00e9", "cafe\u0301"
    save_image(tmp_path / apart / "a.png", 7)
    assert Folder(tmp_path, ("",), AS_PUBLISHED).find(f"{composed}/a.png") == f"{apart}/a.png"


def test_paths_that_could_mean_several_files_are_refused(tmp_path, save_image):
    for name in ("cat/a.png", "CAT/a.png"):
        save_image(tmp_path / name)
    folder = Folder(tmp_path, ("",), AS_PUBLISHED)
    assert folder.find("cat/a.png") == "cat/a.png"
    with pytest.raises(ValueError, match=r"CAT/a.png and cat/a.png could both be meant; write one of them"):
        folder.find("Cat/a.png")
    for outside in ("C:\\data\\a.png", "..\\a.png", "\\a.png", "cat\\..\\..\\a.png"):
        with pytest.raises(ValueError, match="leaves the dataset's folder"):
            folder.find(outside)

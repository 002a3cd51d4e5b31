"""Splits: seeded, stratified, disjoint; and the digits."""

import pickle

import numpy as np
import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import (
    ArraySource,
    Split,
    Splits,
    class_order,
    join,
    shuffled,
    stratified_holdout,
    with_missing_splits,
)
from dist_vpt.errors import DataError


def numbered(name: str, values: list[int], labels: list[int]) -> Split:
    pixels = np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 2, 2, 3))
    return Split(name, np.array(labels, np.int64), ArraySource(pixels, name))


def values(split: Split) -> list[int]:
    return [int(np.asarray(split.read(i))[0, 0, 0]) for i in range(len(split))]


def test_shuffled_is_a_pinned_function_of_its_key():
    assert shuffled(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(shuffled(100, 5)) == list(range(100))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 1, 0))
    assert not np.array_equal(shuffled(100, 0, 1), shuffled(100, 0, 2))


@pytest.mark.parametrize("count", [0, 1, 10, 37, 99, 100])
def test_carve_takes_each_class_in_proportion(count):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    kept, held_out = stratified_holdout(labels, count, 0)
    assert sorted([*kept, *held_out]) == list(range(100))
    expected = min(count, 97)  # each class keeps one
    assert len(held_out) == expected
    taken = np.bincount(labels[held_out], minlength=3)
    assert np.all(np.abs(taken - np.minimum(count * np.array([0.5, 0.3, 0.2]), [49, 29, 19])) <= 1)


def test_carve_keeps_the_last_image_of_a_class():
    labels = np.array([0] * 10 + [1])
    kept, held_out = stratified_holdout(labels, 9, 0)
    assert len(held_out) == 9
    assert set(labels[kept]) == {0, 1}


def test_carve_depends_on_the_seed_alone():
    labels = np.repeat([0, 1], 50)
    assert np.array_equal(stratified_holdout(labels, 10, 3)[1], stratified_holdout(labels, 10, 3)[1])
    assert not np.array_equal(stratified_holdout(labels, 10, 3)[1], stratified_holdout(labels, 10, 4)[1])


def test_subset_and_join_keep_image_label_and_name_together():
    first, second = numbered("a", [10, 11, 12], [0, 1, 2]), numbered("b", [20, 21], [3, 4])
    both = join("both", first.subset("part", np.array([2, 0])), second)
    assert values(both) == [12, 10, 20, 21]
    assert both.labels.tolist() == [2, 0, 3, 4]
    assert [both.where(i) for i in range(4)] == ["a record 2", "a record 0", "b record 0", "b record 1"]


def test_missing_split_gives_the_reason():
    train = numbered("train", [1], [0])
    splits = Splits(("0",), train, None, train, None, {"test": "there is no test.txt; add it"})
    assert splits["train"] is train
    with pytest.raises(DataError, match=r"split 'test' is missing: there is no test\.txt; add it"):
        splits["test"]
    with pytest.raises(DataError, match="split 'val' is missing: the dataset has none"):
        splits["val"]
    with pytest.raises(DataError, match="split 'vall': there is no such split; did you mean 'val'"):
        splits["vall"]


def test_complete_carves_what_is_missing():
    recipe = DataConfig(task="mine", format="image_folder", root="x", val_fraction=0.1, test_fraction=0.2)
    every = numbered("train", list(range(100)), [0, 1] * 50)
    splits = with_missing_splits(recipe, ("0", "1"), {"train": every})
    parts = [values(splits[name]) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [70, 10, 20]
    assert sorted(value for part in parts for value in part) == list(range(100))
    assert sorted(values(splits.trainval)) == sorted(parts[0] + parts[1])
    assert all(splits[name].name == name for name in ("train", "val", "trainval", "test"))
    for name in ("train", "val", "test"):
        assert np.bincount(splits[name].labels).tolist() == [len(splits[name]) // 2] * 2


def test_complete_keeps_what_is_there():
    recipe = DataConfig(task="mine", format="image_folder", root="x")
    train, val, test = (numbered(name, [k], [0]) for k, name in enumerate(("train", "val", "test")))
    splits = with_missing_splits(recipe, ("0",), {"train": train, "val": val, "test": test})
    assert [values(splits[name]) for name in ("train", "val", "trainval", "test")] == [[0], [1], [0, 1], [2]]


def test_fraction_that_carves_nothing_is_refused():
    recipe = DataConfig(task="mine", format="image_folder", root="x")
    with pytest.raises(DataError, match=r"'train': test_fraction 0.2 of 2 images splits off none.*raise data.test"):
        with_missing_splits(recipe, ("0", "1"), {"train": numbered("train", [1, 2], [0, 1])})


def test_class_order():
    assert class_order(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert class_order(["b", "10", "9"]) == ("10", "9", "b")


def test_digits_have_their_counts_and_are_stratified():
    splits = open_splits(DataConfig())
    assert {name: len(splits[name]) for name in ("train", "val", "trainval", "test")} == {
        "train": 1000,
        "val": 200,
        "trainval": 1200,
        "test": 597,
    }
    assert splits.classes == tuple("0123456789")
    for name, each in (("train", 100), ("val", 20), ("test", 59.7)):
        assert np.all(np.abs(np.bincount(splits[name].labels) - each) <= 3)
    pixels = np.stack([np.asarray(splits.val.read(i)) for i in range(200)])
    assert (pixels.shape, pixels.dtype, pixels.min(), pixels.max()) == ((200, 8, 8, 3), np.uint8, 0, 255)
    assert np.unique(pixels).tolist() == [round(255 * gray / 16) for gray in range(17)]


def test_digits_are_disjoint_and_follow_the_seed():
    def records(seed, name):
        split = open_splits(DataConfig(split_seed=seed))[name]
        return [split.where(i) for i in range(len(split))]

    parts = [set(records(0, name)) for name in ("train", "val", "test")]
    assert len(set.union(*parts)) == 1797 == sum(len(part) for part in parts)
    assert set(records(0, "trainval")) == parts[0] | parts[1]
    assert records(0, "val") == records(0, "val")
    assert records(0, "val") != records(1, "val")
    assert records(0, "val")[0].startswith("digits record ")


def test_splits_can_be_sent_to_a_worker():
    val = open_splits(DataConfig()).val
    copy = pickle.loads(pickle.dumps(val))
    assert np.array_equal(copy.read(3), val.read(3))
    assert copy.where(3) == val.where(3)

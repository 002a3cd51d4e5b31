"""HuggingFace datasets without a network: saved ones, folders, columns and splits."""

import io
import pickle
import re
import sys

import numpy as np
import pytest
from PIL import Image

from dist_vpt.errors import DataError, UserError

datasets = pytest.importorskip("datasets")

CLASSES = ["cat", "dog"]


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def part(values, labels, label=None, **columns):
    """A split whose images are of one gray value each."""
    images = [Image.fromarray(np.full((4, 6, 3), value, np.uint8)) for value in values]
    features = {"picture": datasets.Image(), "kind": label or datasets.ClassLabel(names=CLASSES)}
    features |= {name: datasets.Value("int64") for name in columns}
    return datasets.Dataset.from_dict(
        {"picture": images, "kind": labels, **columns}, features=datasets.Features(features)
    )


def grays(split):
    return [int(np.asarray(split.read(i))[0, 0, 0]) for i in range(len(split))]


def save(path, **parts):
    datasets.DatasetDict(parts).save_to_disk(path)


def refused(opened, message, **settings):
    with pytest.raises(DataError) as caught:
        opened("hf", **settings)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_saved_splits(tmp_path, opened):
    save(tmp_path, train=part([1, 2], [0, 1]), valid=part([3], [1]), test=part([4], [0]), extra=part([5], [0]))
    splits = opened("hf")
    assert splits.classes == ("cat", "dog")
    assert [grays(splits[name]) for name in ("train", "val", "trainval", "test")] == [[1, 2], [3], [1, 2, 3], [4]]
    assert splits.trainval.labels.tolist() == [0, 1, 1]
    assert splits.train.where(1) == f"{tmp_path} split 'train' record 1"
    assert splits.train.read(0).mode == "RGB"


def test_a_label_beyond_the_classes(tmp_path, opened):
    stored = part([1, 2], [0, 1])
    table = stored.data.table.set_column(1, "kind", [[0, 2]])  # the library checks labels only when it encodes them
    save(tmp_path, train=datasets.Dataset(table, info=stored.info), test=part([1], [0]))
    refused(opened, "split 'train' record 1: kind 2 must be below 2, the number of its classes; fix the record")


def test_missing_splits_are_carved(tmp_path, opened):
    part(list(range(40)), [0, 1] * 20).save_to_disk(tmp_path)
    splits = opened("hf", val_fraction=0.1, test_fraction=0.2)
    found = [grays(splits[name]) for name in ("train", "val", "test")]
    assert [len(values) for values in found] == [28, 4, 8]
    assert sorted(value for values in found for value in values) == list(range(40))
    assert splits.test.labels.tolist() == [value % 2 for value in found[2]]


def test_pickles_small(tmp_path, opened):
    save(tmp_path, train=part(range(100), [0, 1] * 50), val=part([1], [0]), test=part([1], [0]))
    split = opened("hf").train
    assert len(pickle.dumps(split)) < 5000
    assert grays(pickle.loads(pickle.dumps(split))) == list(range(100))


def test_image_folder_and_split_expressions(tmp_path, opened, save_image):
    for label, name in enumerate(CLASSES):
        for i in range(4):
            save_image(tmp_path / name / f"{i}.png", 10 * label + i)
    splits = opened("hf", val_fraction=0.25, test_fraction=0.25)
    assert splits.classes == ("cat", "dog")
    assert sorted(grays(splits.trainval) + grays(splits.test)) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert splits.trainval.where(0).endswith("cat/0.png)")
    hf = {"splits": {"train": "train[:3]+train[-3:]", "val": "train[3:4]", "test": "train[4:5]"}}
    splits = opened("hf", hf=hf)
    assert [grays(splits[name]) for name in ("train", "val", "test")] == [[0, 1, 2, 11, 12, 13], [3], [10]]
    refused(
        opened,
        r"cannot be opened \(ValueError: .*train\[:0\].*no data",
        hf={"splits": {"train": "train", "val": "train[:0]"}},
    )


@pytest.mark.parametrize(
    ("kind", "labels", "classes"), [("int64", [30, 4], ("4", "30")), ("string", ["wren", "owl"], ("owl", "wren"))]
)
def test_labels_may_be_numbers_or_text(tmp_path, opened, kind, labels, classes):
    label = datasets.Value(kind)
    save(
        tmp_path, train=part([1, 2], labels, label), val=part([3], labels[:1], label), test=part([3], labels[1:], label)
    )
    splits = opened("hf", hf={"label": "kind"})
    assert splits.classes == classes
    assert [splits[name].labels.tolist() for name in ("train", "val", "test")] == [[1, 0], [1], [0]]
    save(tmp_path / "b", train=part([1], labels[:1], label), val=part([3], labels[1:], label))
    refused(
        opened,
        rf"split 'val' record 0: kind '{labels[1]}' has no image in train; valid: {labels[0]}",
        root=str(tmp_path / "b"),
        hf={"label": "kind"},
    )


def test_columns_must_be_chosen_where_they_are_not_plain(tmp_path, opened):
    label = datasets.Value("int64")
    save(tmp_path, train=part([1, 2], [0, 1], label, other=[0, 1]))
    found = r"has 0 columns of type ClassLabel among picture \(Image\), kind \(int64\), other \(int64\)"
    refused(opened, f"{found}; one is needed; choose it with data.hf.label")
    refused(opened, r"data.hf.label 'knid': no such column; did you mean 'kind'\?", hf={"label": "knid"})
    refused(opened, "data.hf.image 'other': is a column of int64; choose one of images, of", hf={"image": "other"})


def encoded(i):
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("stored", ["binary", "bytes and path", "string"])
def test_images_that_nobody_has_declared(stored, tmp_path, opened):
    text, kept = datasets.Value("string"), datasets.Value("binary")
    values, kind = [encoded(1), encoded(2)], kept
    if stored == "bytes and path":
        values, kind = [{"bytes": each, "path": "a.png"} for each in values], {"bytes": kept, "path": text}
    elif stored == "string":
        for i, each in enumerate(values):
            (tmp_path / f"{i}.png").write_bytes(each)
        values, kind = [str(tmp_path / f"{i}.png") for i in range(2)], text
    features = datasets.Features({"picture": kind, "kind": datasets.ClassLabel(names=CLASSES)})
    split = datasets.Dataset.from_dict({"picture": values, "kind": [0, 1]}, features=features)
    save(tmp_path / "data", train=split, val=split, test=split)
    root = str(tmp_path / "data")
    if stored == "string":  # could be anything
        refused(opened, r"has 0 columns of type Image among picture \(string\)", root=root)
    splits = opened("hf", root=root, hf={"image": "picture"} if stored == "string" else {})
    assert grays(splits["test"]) == [1, 2]


def test_a_split_without_records(tmp_path, opened):
    save(tmp_path, train=part([1, 2], [0, 1]), validation=part([], []), test=part([3], [0]))
    refused(opened, "one of its splits has no record; save the dataset without this split")


def test_two_splits_that_could_be_one(tmp_path, opened):
    save(tmp_path, train=part([1, 2], [0, 1]), dev_set=part([3], [1]), Validation=part([4], [0]))
    refused(opened, "dev_set and Validation could both be the split 'val'; choose one: 'data.hf.splits={val: ...}'")


def test_splits_called_otherwise(tmp_path, opened):
    save(tmp_path, Train=part([1, 2], [0, 1]), dev_set=part([3], [1]), TESTING=part([4], [0]), extra=part([5], [0]))
    splits = opened("hf")
    assert [grays(splits[name]) for name in ("train", "val", "test")] == [[1, 2], [3], [4]]


def test_record_without_a_class(tmp_path, opened):
    label = datasets.Value("float64")
    save(tmp_path, train=part([1, 2], [0, None], label))
    refused(opened, "split 'train' record 0: kind 0.0 is not a class; fix the record", hf={"label": "kind"})


def test_record_without_an_image(tmp_path, opened):
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=CLASSES))
    broken = datasets.Dataset.from_dict({"picture": [None], "kind": [0]}, features=features)
    save(tmp_path, train=part([1, 2], [0, 1]), val=broken, test=part([1], [0]))
    with pytest.raises(DataError, match="split 'val' record 0: has no image; remove the record"):
        opened("hf").val.read(0)


def test_images_stand_upright(tmp_path, opened):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        image.save(tmp_path / "train" / name / "x.jpg", exif=exif)
    splits = opened("hf", hf={"splits": dict.fromkeys(("train", "val", "test"), "train")})
    assert splits.train.read(0).size == (4, 6)


def test_hidden_labels(tmp_path, opened):
    save(tmp_path, train=part([1, 2], [0, 1]), val=part([1], [0]), test=part([1, 2], [-1, -1]))
    splits = opened("hf")
    with pytest.raises(DataError, match=r"'test' is missing: .*split 'test' record 0 has label -1, so its labels are"):
        splits["test"]
    save(tmp_path / "b", train=part([1, 2], [0, -1]))
    refused(opened, "'train' record 1 has label -1.*'data.hf.splits={train: ...}'", root=str(tmp_path / "b"))


def test_splits_must_agree(tmp_path, opened):
    other = part([1], [0], datasets.ClassLabel(names=["dog", "cat"]))
    plain = part([1], [0]).rename_column("kind", "sort")
    blind = part([1], [0]).rename_column("picture", "image")
    for name, val, message in (
        ("order", other, "split 'val': the classes of column 'kind' differ from those of train"),
        ("label", plain, "split 'val': has no column 'kind'; valid: picture, sort"),
        ("image", blind, "split 'val': column 'picture' is not an Image column"),
    ):
        for split_name, saved in (("train", part([1, 2], [0, 1])), ("validation", val)):
            saved.save_to_disk(tmp_path / name / split_name)
        (tmp_path / name / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
        refused(opened, message, root=str(tmp_path / name))


def test_no_split_to_train_on(tmp_path, opened):
    save(tmp_path, all=part([1, 2], [0, 1]))
    refused(opened, r"has no split 'train' but 'all'; set the one to train on: 'data.hf.splits={train: \.\.\.}'")
    refused(opened, "data.hf.splits.train 'every': no such saved split; valid: all", hf={"splits": {"train": "every"}})
    splits = opened("hf", hf={"splits": {"train": "all", "val": "all", "test": "all"}})
    assert grays(splits.val) == [1, 2]


def test_unreachable_hub(opened):
    refused(
        opened,
        r"data.root 'no/such': is not a folder, and as a dataset of the hub it cannot be opened \(.*no/such",
        root="no/such",
    )


def test_folder_without_data(tmp_path, opened):
    refused(opened, r"data.root .*: cannot be opened \(.*\); check the name and data.hf")


def test_package_is_optional(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets; pip install 'dist-vpt\[hf\]'"):
        opened("hf")

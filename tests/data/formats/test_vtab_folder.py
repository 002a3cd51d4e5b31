"""The vtab-1k folder: what is read and every mistake that is reported."""

import pickle
import re

import numpy as np
import pytest

from dist_vpt.data.tasks import TASKS, Task
from dist_vpt.errors import DataError

LISTS = {
    "train800.txt": "a/0.png 0\nb/1.png 1\n\n",
    "val200.txt": "images/a/2.png 0\r\n  images/b/3.png\t1  \n",
    "train800val200.txt": "b/1.png 1\na/0.png 0\na/2.png 0\nb/3.png 1\n",
    "test.txt": "a/with space.png 0\n",
}


@pytest.fixture
def folder(tmp_path, save_image):
    for value, name in enumerate(("a/0.png", "b/1.png", "a/2.png", "b/3.png", "a/with space.png")):
        save_image(tmp_path / "images" / name, 10 * value)
    for name, text in LISTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def refused(opened, message):
    with pytest.raises(DataError) as caught:
        opened("vtab_folder")
    assert re.search(message, str(caught.value)), str(caught.value)
    return str(caught.value)


def test_reads_the_four_lists(folder, opened):
    splits = opened("vtab_folder")
    assert splits.classes == ("0", "1")
    assert [splits[name].labels.tolist() for name in ("train", "val", "trainval", "test")] == [
        [0, 1],
        [0, 1],
        [1, 0, 0, 1],
        [0],
    ]
    assert splits.train.labels.dtype == np.int64
    assert [np.asarray(splits.trainval.read(i))[0, 0, 0] for i in range(4)] == [10, 0, 20, 30]
    assert splits.val.where(0) == str(folder / "images/a/2.png")
    assert splits.test.where(0).endswith("with space.png")


def test_path_may_start_at_the_root(folder, opened, save_image):
    save_image(folder / "a/0.png", 77)
    assert np.asarray(opened("vtab_folder").train.read(0))[0, 0, 0] == 77


def test_root_may_be_relative(folder, opened, monkeypatch):
    monkeypatch.chdir(folder.parent)
    split = opened("vtab_folder", root=folder.name).train
    monkeypatch.chdir("/")
    assert split.read(1).size == (12, 10)


def test_class_names(folder, opened):
    (folder / "classes.txt").write_text("\ufeffcat\n\ndog \nbird\n", encoding="utf-8")
    assert opened("vtab_folder", absent_classes="allow").classes == ("cat", "dog", "bird")
    refused(opened, "1 of 3 classes have no image in split 'train' .bird.; complete it, or set")


def test_task_declares_the_classes(folder, opened, monkeypatch):
    monkeypatch.setitem(TASKS, "mine", Task(name="mine", format="vtab_folder", classes=3))
    assert opened("vtab_folder", absent_classes="allow").classes == ("0", "1", "2")
    monkeypatch.setitem(TASKS, "mine", Task(name="mine", format="vtab_folder", classes=1))
    refused(opened, "train800.txt:2: label 1 is out of range: 1 classes have the labels 0 to 0; fix the label")


def test_trainval_is_made_where_its_list_is_missing(folder, opened):
    (folder / "train800val200.txt").unlink()
    splits = opened("vtab_folder")
    assert [np.asarray(splits.trainval.read(i))[0, 0, 0] for i in range(4)] == [0, 10, 20, 30]


def test_test_list_is_needed_only_when_asked_for(folder, opened):
    (folder / "test.txt").unlink()
    splits = opened("vtab_folder")
    assert splits.test is None
    with pytest.raises(DataError, match=r"'test' is missing: there is no .*test\.txt; add the list"):
        splits["test"]


def test_val_list_too(folder, opened):
    (folder / "val200.txt").unlink()
    assert opened("vtab_folder").val is None
    (folder / "train800val200.txt").unlink()
    refused(opened, r"splits 'val' and 'trainval' are missing: there is no .*val200\.txt; add the list")


def test_train_list_is_needed(folder, opened):
    (folder / "train800.txt").unlink()
    refused(opened, r"split 'train' is missing: there is no .*train800\.txt; add the list")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a/0.png", "'a/0.png' has no label; write 'relative/path label'"),
        ("a/0.png cat", "label 'cat' is not a class number; write"),
        ("a/0.png 1.0", "label '1.0' is not a class number"),
        ("a/0.png 99999999999999999999", "is not a class number"),
        ("a/0.png -1", "label -1 is negative; labels count from 0"),
        ("a/9.png 0", "there is no file 'a/9.png' in .* or .*images; restore it or remove its entry"),
        ("a 0", "there is no file 'a'"),
        ("../secret.png 0", "path '../secret.png' leaves the dataset's folder; give it relative"),
        ("a/../../x.png 0", "leaves the dataset's folder"),
        ("/etc/passwd 0", "path '/etc/passwd' leaves"),
        ("a/0\0.png 0", "there is no file"),
    ],
)
def test_line_is_refused(folder, opened, line, says):
    with (folder / "train800.txt").open("a") as file:
        file.write(line + "\n")
    refused(opened, rf"^{re.escape(str(folder / 'train800.txt'))}:4: .*{says}")


def test_label_beyond_the_class_names(folder, opened):
    (folder / "classes.txt").write_text("cat\n")
    refused(opened, "train800.txt:2: label 1 is out of range: 1 classes have the labels 0 to 0; .*classes.txt")


@pytest.mark.parametrize(("text", "says"), [("", "lists no class"), ("cat\ndog\ncat\n", "class 'cat' occurs twice")])
def test_bad_class_names(folder, opened, text, says):
    (folder / "classes.txt").write_text(text)
    refused(opened, f"classes.txt: {says}; give each class one line, or remove the file")


def test_empty_list(folder, opened):
    (folder / "test.txt").write_text("\n \n")
    refused(opened, "test.txt: is empty; add a 'relative/path label' line for each image")


def test_binary_list(folder, opened):
    (folder / "test.txt").write_bytes(b"a/0.png 0\n\xff\xfe")
    refused(opened, "test.txt: byte 10 is not UTF-8; save the file as UTF-8 text")


def test_list_that_is_a_folder(folder, opened):
    (folder / "test.txt").unlink()
    (folder / "test.txt").mkdir()
    refused(opened, "test.txt: cannot be read .*; fix the file or its permissions")


@pytest.mark.parametrize(("label", "absent"), [(2, 1), (4, 3), (999_999_999, 999_999_998)])
def test_label_without_a_training_image(folder, opened, label, absent):
    (folder / "test.txt").write_text(f"a/0.png {label}\n")
    refused(
        opened,
        rf"no image of train or trainval has label 2 \({absent} of the labels 0 to {label} are absent\); "
        r"fix the labels, or list all classes, one a line, in .*classes\.txt",
    )


def test_named_class_needs_no_training_image(folder, opened):
    (folder / "test.txt").write_text("a/0.png 4\n")
    (folder / "classes.txt").write_text("\n".join("abcde"))
    assert opened("vtab_folder", absent_classes="allow").test.labels.tolist() == [4]


def test_gap_in_the_labels(folder, opened):
    for name in LISTS:
        (folder / name).write_text("a/0.png 0\na/2.png 2\n")
    refused(opened, "no image of train or trainval has label 1 .1 of the labels 0 to 2 are absent")


def test_first_ten_mistakes_and_their_number(folder, opened):
    (folder / "train800.txt").write_text("a/0.png\n" * 12)
    (folder / "test.txt").write_text("a/0.png x\n")
    message = refused(opened, "train800.txt:10: ")
    assert len(message.splitlines()) == 11
    assert message.endswith("... and 3 more, 13 in all")


def test_root_that_is_no_folder(folder, opened):
    with pytest.raises(DataError, match=r"data.root '.*imagse': .* is not a folder; did you mean 'images'\?"):
        opened("vtab_folder", root=str(folder / "imagse"))
    with pytest.raises(DataError, match=r"is not a folder; use the folder of the dataset"):
        opened("vtab_folder", root=str(folder / "a/b/c"))


def test_pickles_small(folder, opened):
    split = opened("vtab_folder").trainval
    assert len(pickle.dumps(split)) < 2000
    assert pickle.loads(pickle.dumps(split)).read(0).size == (12, 10)

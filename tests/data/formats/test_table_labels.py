"""Tables whose images have several labels: the three ways to write them, and every mistake that is reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Splits
from dist_vpt.errors import DataError

Write = Callable[..., Path]
IMAGES = ("a", "b", "c", "d", "v", "t")
# The labels of each image: none, one or more.
SEPARATED = """image,labels,split
a.png,cat;dog,train
b.png,,train
c.png,cow,train
d.png,cow;cat,train
v.png,dog,val
t.png,dog;cow;cat,test
"""
PAIRS = """file_name,category,split
a.png,dog,train
a.png,cat,train
b.png,,train
c.png,cow,train
d.png,cat,train
d.png,cow,train
v.png,dog,val
t.png,cow,test
t.png,cat,test
t.png,dog,test
"""
COLUMNS = """image,cat,cow,dog,split
a.png,1,0,1,train
b.png,0,0,0,train
c.png,0,1,0,train
d.png,1,1,0,train
v.png,0,0,1,val
t.png,1,1,1,test
"""


def table(file: Path, one: bool = False, **keys: Any) -> Splits:
    """``one``: an image has one label."""
    common = {name: keys.pop(name) for name in ("absent_classes", "fraction") if name in keys}
    labels: Any = "single" if one else "multiple"
    return open_splits(DataConfig(task="mine", format="table", root=str(file), labels=labels, table=keys, **common))


@pytest.fixture
def write(tmp_path: Path, save_image: Callable[..., Path]) -> Write:
    """Writes a table, and its images."""
    for value, name in enumerate(IMAGES):
        save_image(tmp_path / f"{name}.png", value)

    def write_table(text: str, name: str = "labels.csv") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write_table


@pytest.mark.parametrize("text", [SEPARATED, SEPARATED.replace(";", "|"), PAIRS, COLUMNS], ids=range(4))
def test_three_ways_to_write_the_same(text: str, write: Write) -> None:
    splits = table(write(text))
    assert splits.classes == ("cat", "cow", "dog")
    assert splits.train.multiple
    assert splits.train.labels.dtype == "uint8"
    assert splits.train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    assert splits["val"].labels.tolist() == [[0, 0, 1]]
    assert splits["test"].labels.tolist() == [[1, 1, 1]]
    assert len(splits.trainval) == 5
    assert [Path(splits.train.where(i)).name for i in range(4)] == ["a.png", "b.png", "c.png", "d.png"]


@pytest.mark.parametrize(("name", "sign"), [("space", " "), ("comma", ", ")])
def test_a_separator_that_names_may_have_is_named(name: str, sign: str, write: Write) -> None:
    rows = [line.split(",") for line in SEPARATED.replace(";", "~").splitlines()]
    text = "".join(f'{image},"{labels.replace("~", sign)}",{split}\n' for image, labels, split in rows)
    file = write(text)
    assert table(file, separator=name).classes == ("cat", "cow", "dog")
    assert table(file, absent_classes="allow", classes=("dog", "cow", "cat"), separator=name).classes[0] == "dog"
    with pytest.raises(DataError, match="has no image in train"):  # cat dog is a class of its own, and no other has it
        table(file)


def test_which_separator_was_found_is_in_the_log(write: Write) -> None:
    assert table(write(SEPARATED)).remarks == ("an image's labels are separated by a semicolon (data.table.separator)",)
    assert table(write(SEPARATED), separator="semicolon").remarks == ()
    assert table(write(PAIRS)).remarks == ()


def test_columns_by_name_and_in_their_order(write: Write) -> None:
    text = COLUMNS.replace("split\n", "split,width\n").replace(",train\n", ",train,640\n")
    file = write(text.replace(",val\n", ",val,640\n").replace(",test\n", ",test,640\n"))
    splits = table(file, labels=["dog", "cat"])
    assert splits.classes == ("dog", "cat")
    assert splits.train.labels.tolist() == [[1, 1], [0, 0], [0, 0], [0, 1]]
    with pytest.raises(DataError, match=r"column 'width' has '640'; write 1 or 0 for each class, or name the columns"):
        table(file)


def test_classes_by_number_get_their_names(write: Write) -> None:
    numbers = SEPARATED.replace("cat", "0").replace("cow", "1").replace("dog", "2")
    splits = table(write(numbers), classes=("Katze", "Kuh", "Hund"))
    assert splits.classes == ("Katze", "Kuh", "Hund")
    assert splits.train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]


def test_a_file_for_each_split(write: Write, tmp_path: Path) -> None:
    head = "image,cat,cow,dog\n"
    for split in ("train", "val", "test"):
        rows = [line.rpartition(",") for line in COLUMNS.splitlines()[1:]]
        write(head + "".join(f"{row}\n" for row, _, of in rows if of == split), f"{split}.csv")
    splits = table(tmp_path)
    assert splits.train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    write("image,cow,dog\nv.png,0,1\n", "val.csv")
    with pytest.raises(DataError, match=r"val.csv: has no column 'cat', as the split before it; add it"):
        table(tmp_path)
    write("image,cat,cow,dog\nv.png,0,0,1\n", "val.csv")
    write("image\nt.png\n", "test.csv")
    assert table(tmp_path).test is None


def test_parquet_with_lists_of_labels(tmp_path: Path, write: Write) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(SEPARATED)
    rows = [line.split(",") for line in SEPARATED.splitlines()[1:]]
    columns = {"image": [row[0] for row in rows], "split": [row[2] for row in rows]}
    labels = [row[1].split(";") if row[1] else [] for row in rows]
    pq.write_table(pa.table(columns | {"labels": labels}), tmp_path / "lists.parquet")
    assert table(tmp_path / "lists.parquet").train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]
    yes = {name: [name in own for own in labels] for name in ("cat", "cow", "dog")}
    pq.write_table(pa.table(columns | yes), tmp_path / "columns.parquet")
    assert table(tmp_path / "columns.parquet").train.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]]


def test_splits_are_made_in_proportion_to_the_classes(tmp_path: Path, save_image: Callable[..., Path]) -> None:
    lines = ["image,a,b,c\n"]
    for i in range(100):
        save_image(tmp_path / f"{i}.png", i % 256)
        lines.append(f"{i}.png,{int(i % 2 == 0)},{int(i % 5 == 0)},{int(i % 20 == 0)}\n")
    (tmp_path / "labels.csv").write_text("".join(lines))
    splits = table(tmp_path / "labels.csv")
    assert [len(splits[name]) for name in ("train", "val", "test")] == [70, 10, 20]
    assert splits["test"].labels.sum(0).tolist() == [10, 4, 1]
    assert splits["val"].labels.sum(0).tolist() in ([5, 2, 1], [5, 2, 0])
    half = table(tmp_path / "labels.csv", fraction=0.5).train
    assert len(half) == 35
    assert 16 <= half.labels.sum(0)[0] <= 19
    assert half.labels.sum(0).min() >= 1


@pytest.mark.parametrize(
    ("text", "keys", "error"),
    [
        (SEPARATED, {"one": True}, r"labels.csv:3: the label is empty"),
        (
            SEPARATED.replace("b.png,,", "b.png,cat,"),
            {"one": True},
            r"label 'cow;cat' names several classes that other labels name, too; set data.labels=multiple, or if it",
        ),
        (
            PAIRS.replace("b.png,,", "b.png,cat,"),
            {"one": True},
            r"'a.png' has the label 'cat', and 'dog' in line 2; an image has one label: remove one of the rows, or set "
            "data.labels=multiple",
        ),
        (COLUMNS, {"one": True}, r"set data.table.label \(or data.labels=multiple, where each class has a col"),
        (COLUMNS.replace("1,0,1,t", "1,-1,1,t"), {}, r"labels.csv:2: column 'cow' has '-1'; write 1 or 0 for each cl"),
        (COLUMNS.replace("1,0,1,t", "1,,1,t"), {}, r"labels.csv:2: column 'cow' is empty; write 1 or 0 for each class"),
        (PAIRS.replace("cow,train", "sheep,train"), {}, r"labels.csv:9: label 'cow' has no image in train"),
        (SEPARATED.replace("dog,val", "bird,val"), {}, r"label 'bird' has no image in train"),
        (
            "image,split\na.png,train\nt.png,test\n",
            {},
            r"has neither a column of labels nor columns of 0 and 1 for two",
        ),
        (
            COLUMNS + "a.png,0,0,1,test\n",
            {},
            r"'a.png' has the labels dog, and cat, dog in line 2, which is in another split or has another path",
        ),
        (
            COLUMNS.replace("1,0,1,train", "0,0,1,train").replace("1,1,0,train", "0,1,0,train"),
            {},
            r"1 of 3 classes have no image in split 'train' \(cat\); complete it, or set data.absent_classes=allow",
        ),
        ("image,labels\na.png,\nb.png,\nc.png,\n", {}, r"no image of train has a label; fill the column of the labels"),
    ],
    ids=range(12),
)
def test_mistakes(text: str, keys: dict[str, Any], error: str, write: Write) -> None:
    file = write(text)
    with pytest.raises(DataError, match=error):
        table(file, **keys)


def test_labels_that_name_several_classes_under_one_label_an_image(write: Write) -> None:
    text = "image,label\na.png,cat;dog\nb.png,cat\nc.png,dog\nd.png,cow\n"
    with pytest.raises(DataError, match=r"label 'cat;dog' names several classes that other labels name, too; set data"):
        table(write(text), one=True)
    classes = ("cat;dog", "cat", "dog", "cow")
    rows = "".join(
        f"{name}.png,{classes[i % 4]},{'val' if name == 'v' else 'train'}\n" for i, name in enumerate(IMAGES)
    )
    assert table(write("image,label,split\n" + rows), one=True, classes=classes).classes == classes


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (
            {"format": "image_folder", "labels": "multiple"},
            "format 'image_folder' has one label an image; use format t",
        ),
        (
            {"labels": "multiple", "shots": 4},
            "shots = 4: an image with several labels is of several classes at once; use",
        ),
        ({"table": {"separator": "pipe"}}, "table.separator: is of several labels an image; set data.labels=multiple"),
        ({"table": {"labels": ["a", "b"]}}, "table.labels: is of several labels an image; set data.labels=multiple"),
        (
            {"labels": "multiple", "table": {"labels": ["a", "b"], "label": "c"}},
            "table.labels and table.label: a column for each class, or one for all labels; set either",
        ),
    ],
    ids=range(5),
)
def test_mistakes_of_the_recipe(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        DataConfig(**({"task": "mine", "format": "table", "root": "x"} | keys))

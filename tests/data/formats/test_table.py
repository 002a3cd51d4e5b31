"""Tables of image paths and labels: what is read, and every mistake that is reported."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import check_root, open_splits
from dist_vpt.data.formats.table import label_of_cell, read_rows
from dist_vpt.data.splits import Split, Splits, class_order
from dist_vpt.errors import DataError, UserError

Write = Callable[..., Path]
PATHS = [f"{i}.png" for i in range(30)]
TWO = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(30))
BOTH = "a.png,cat,train\nb.png,dog,train\nv.png,cat,val\nt.png,dog,test\n"


def gray(split: Split, i: int) -> int:
    return int(np.asarray(split.read(i))[0, 0, 0])


def names(split: Split | None) -> list[str]:
    assert split is not None
    return [Path(split.where(i)).name for i in range(len(split))]


def table(file: Path, **keys: Any) -> Splits:
    common = {name: keys.pop(name) for name in ("val_fraction", "test_fraction", "absent_classes") if name in keys}
    return open_splits(DataConfig(task="mine", format="table", root=str(file), table=keys, **common))


def unsplit(file: Path, keys: dict[str, Any]) -> list[tuple[str, str]]:
    """Paths and labels of a table without splits."""
    rows = read_rows(DataConfig(task="mine", format="table", root=str(file), table=keys))
    assert rows.holdout_test
    return [(row.path, row.label) for row in rows.of["train"]]


@pytest.fixture
def write(tmp_path: Path, save_image: Callable[..., Path]) -> Write:
    """Writes a table of text, and images of rising gray for the paths."""

    def write_all(text: str, name: str = "labels.csv", images: tuple[str, ...] | list[str] = ()) -> Path:
        for value, path in enumerate(images):
            save_image(tmp_path / path, value)
        (tmp_path / name).write_bytes(text.encode())
        return tmp_path / name

    return write_all


@pytest.fixture
def small(write: Write) -> Path:
    """A table with a column of splits."""
    return write("image,label,split\n" + BOTH, images=["a.png", "b.png", "v.png", "t.png"])


def test_a_table_is_enough(write: Write, tmp_path: Path) -> None:
    file = write("path,label\n" + TWO, images=PATHS)
    splits = table(file, val_fraction=0.1, test_fraction=0.2)
    assert splits.classes == ("cat", "dog")
    assert splits.held_out == ("test", "val")
    assert [len(splits[name]) for name in ("train", "val", "test", "trainval")] == [21, 3, 6, 24]
    for name in ("train", "val", "test"):
        for i, file_name in enumerate(names(splits[name])):
            value = int(Path(file_name).stem)
            assert gray(splits[name], i) == value
            assert splits.classes[splits[name].labels[i]] == ("cat" if value % 2 else "dog")
    folder = table(tmp_path, val_fraction=0.1, test_fraction=0.2)  # the only table in a folder
    assert names(folder.test) == names(splits.test)
    assert splits.storage == "table"


def test_splits_by_a_column(small: Path) -> None:
    splits = table(small)
    assert (names(splits.train), names(splits.val), names(splits.test)) == (["a.png", "b.png"], ["v.png"], ["t.png"])
    assert splits.train.labels.tolist() == [0, 1]
    assert (splits.val.labels.tolist(), splits.test.labels.tolist()) == ([0], [1])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("train", "val", "test"), [("TRAIN", "Valid", "Testing"), ("training", "dev", "test"), ("train_set", "val", "Test")]
)
def test_splits_by_their_usual_names(train: str, val: str, test: str, write: Write) -> None:
    text = BOTH.replace(",train", f",{train}").replace(",val", f",{val}").replace(",test", f",{test}")
    splits = table(write("filename,category,Set\n" + text, images=["a.png", "b.png", "v.png", "t.png"]))
    assert (names(splits.val), names(splits.test)) == (["v.png"], ["t.png"])


def test_splits_by_their_names_in_the_recipe(write: Write) -> None:
    rows = "a.png,cat,0\nb.png,dog,0\nv.png,cat,1\nt.png,dog,2\nx.png,dog,3\n"
    file = write("image,label,fold\n" + rows, images=["a.png", "b.png", "v.png", "t.png"])
    splits = table(file, splits={"train": 0, "val": 1, "test": 2})
    assert (names(splits.val), names(splits.test)) == (["v.png"], ["t.png"])
    assert splits.remarks == (f"{file}: rows in none of data.table.splits, which are not read: 1",)


def test_splits_by_files(write: Write, tmp_path: Path) -> None:
    for split, rows in (("train", "a.png,cat\nb.png,dog\n"), ("valid", "v.png,cat\n"), ("test", "t.png,dog\n")):
        write("image,label\n" + rows, f"{split}.csv")
    write("id,label\nt.png,cat\n", "sample_submission.csv", ["a.png", "b.png", "v.png", "t.png"])
    splits = table(tmp_path)
    assert (names(splits.train), names(splits.val), names(splits.test)) == (["a.png", "b.png"], ["v.png"], ["t.png"])
    assert splits.remarks == (f"{tmp_path}: tables that are not read: sample_submission.csv",)
    chosen = table(tmp_path, splits={"train": "train.csv", "val": "test.csv", "test": "valid.csv"})
    assert (names(chosen.val), names(chosen.test)) == (["t.png"], ["v.png"])


def test_files_that_are_called_like_splits(write: Write, tmp_path: Path) -> None:
    write("id,label\na,cat\nb,dog\n", "train_labels.csv", ["train/a.jpg", "train/b.jpg"])
    write("id\nt\n", "test.csv")
    config: dict[str, Any] = {"images": "train", "suffix": ".jpg"}
    with pytest.raises(DataError, match=r"val_fraction 0.1 of 2 images splits off none"):  # all else is found
        table(tmp_path, **config)
    write("id,label\na,cat\nb,dog\nc,cat\nd,dog\n", "train_labels.csv", [f"train/{name}.jpg" for name in "abcd"])
    splits = table(tmp_path, **config, val_fraction=0.5)
    with pytest.raises(DataError, match=r"'test' is missing: .*test.csv has no column of labels; add it, or set train"):
        splits["test"]


def test_a_test_without_labels_is_missing(write: Write) -> None:
    rows = BOTH.replace("t.png,dog", "t.png,")
    splits = table(write("image,label,split\n" + rows, images=["a.png", "b.png", "v.png", "t.png"]))
    with pytest.raises(DataError, match=r"'test' is missing: .*labels.csv has no label for any row of test; add them"):
        splits["test"]


def test_val_is_split_off_and_test_must_be_there(write: Write) -> None:
    rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},train\n" for i in range(30))
    splits = table(write("image,label,split\n" + rows, images=PATHS), val_fraction=0.2)
    assert (len(splits.train), splits.held_out) == (24, ("val",))
    with pytest.raises(
        DataError, match=r"'test' is missing: .* has no row of split 'test'; add it, or set train.test="
    ):
        splits["test"]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("image,label\r\na.png,cat\r\nb.png,dog\r\n", {}),
        ("\ufeffimage,label\na.png,cat\nb.png,dog", {}),
        ("image;label\na.png;cat\nb.png;dog\n", {}),
        ("image\tlabel\na.png\tcat\nb.png\tdog\n", {}),
        ("image|label\na.png|cat\nb.png|dog\n", {}),
        ('"image","label"\n"a.png","cat"\n"b.png","dog"\n', {}),
        ("\n\nimage,label\n\na.png,cat\n\n,\nb.png,dog\n\n", {}),
        ("image,label,,\na.png,cat,,\nb.png,dog,,\n", {}),
        (",image,label\n0,a.png,cat\n1,b.png,dog\n", {}),  # an index, as pandas writes it
        ("image , label\n a.png, cat \nb.png ,dog\n", {}),
        ("Image Path,Class Name\na.png,cat\nb.png,dog\n", {}),
        ("image_id,path,target\n1,a.png,cat\n2,b.png,dog\n", {}),
        ("x,y,z\n1,cat,a.png\n2,dog,b.png\n", {"image": "z"}),
        ("kind,image,path\ncat,x,a.png\ndog,y,b.png\n", {"image": "Path", "label": "KIND"}),
        ("image,label,comment\na.png,cat,\"two\nlines, and a comma\"\nb.png,dog,\n", {}),
    ],
)  # fmt: skip
def test_texts_as_programs_write_them(text: str, keys: dict[str, Any], write: Write) -> None:
    file = write(text, images=["a.png", "b.png"])
    assert unsplit(file, keys) == [("a.png", "cat"), ("b.png", "dog")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"])
def test_encodings(encoding: str, write: Write, tmp_path: Path) -> None:
    write("", images=["caf\u00e9.png", "b.png"])
    (tmp_path / "labels.csv").write_bytes("image,label\ncaf\u00e9.png,th\u00e9\nb.png,dog\n".encode(encoding))
    keys = {"encoding": encoding} if encoding in ("latin-1", "cp1252", "utf-16-le") else {}
    assert unsplit(tmp_path / "labels.csv", keys) == [("caf\u00e9.png", "th\u00e9"), ("b.png", "dog")]
    if encoding in ("latin-1", "cp1252"):
        message = r"labels.csv:2: byte 15 \(0xe9\) is not utf-8; save the table as UTF-8, or set data.table.encoding to"
        with pytest.raises(DataError, match=message):
            table(tmp_path / "labels.csv")


@pytest.mark.parametrize("written", ["pics/a.png", "{root}/pics/a.png"])
@pytest.mark.parametrize(("images", "path"), [(None, "pics/a.png"), ("pics", "a.png"), ("{root}/pics", "a.png")])
def test_where_paths_begin(written: str, images: str | None, path: str, write: Write, tmp_path: Path) -> None:
    if not written.startswith("{"):
        written = path
    file = write(f"image,label,split\n{written},cat,train\nv.png,dog,train\n{written},cat,val\n".format(root=tmp_path))
    for name in ("pics/a.png", "v.png", "pics/v.png"):
        write("", "other.txt", [name])
    keys = {} if images is None else {"images": images.format(root=tmp_path)}
    assert table(file, **keys).train.where(0) == str(tmp_path / "pics/a.png")


def test_absolute_paths_of_anywhere(write: Write, tmp_path: Path) -> None:
    text = (
        "".join(f"{tmp_path}/{path},cat,train\n" for path in ("x/a.png", "y/b.png")) + f"{tmp_path}/c.png,dog,train\n"
    )
    (tmp_path / "tables").mkdir()
    file = write("image,label,split\n" + text + f"{tmp_path}/v.png,dog,val\n", "tables/labels.csv")
    write("", "none.txt", ["x/a.png", "y/b.png", "c.png", "v.png"])
    with pytest.raises(
        DataError, match=r"labels.csv:2: '/.*/x/a.png' is not below /.*/tables; data.table.images=/ reads"
    ):
        table(file)
    assert names(table(file, images="/").train) == ["a.png", "b.png", "c.png"]


def test_images_beside_the_table_are_found_in_images(write: Write, tmp_path: Path) -> None:
    file = write("image,label,split\n" + BOTH, images=[f"images/{name}.png" for name in "abvt"])
    assert table(file).train.where(0) == str(tmp_path / "images/a.png")


def test_classes_are_as_given(write: Write) -> None:
    rows = "".join(f"{i}.png,{label},train\n" for i, label in enumerate(["10", "9", "02", "-1"]))
    file = write("image,label,split\n" + rows + "4.png,9,val\n", images=PATHS[:5])
    splits = table(file)
    assert splits.classes == ("-1", "02", "9", "10")
    assert splits.train.labels.tolist() == [3, 2, 1, 0]
    assert splits.val.labels.tolist() == [2]  # type: ignore[union-attr]
    assert class_order(["1.0", "10.0", "2.0"]) == ("1.0", "2.0", "10.0")
    assert class_order(["b", "10", "9"]) == ("10", "9", "b")
    assert class_order(["7", "07", "007"]) == class_order(["007", "7", "07"]) == ("007", "07", "7")


@pytest.mark.parametrize("by", ["key", "file"])
@pytest.mark.parametrize("numbers", [False, True])
def test_classes_in_an_order_of_ones_own(by: str, numbers: bool, small: Path, tmp_path: Path) -> None:
    if numbers:
        small.write_text(small.read_text().replace("cat", "1").replace("dog", "0"))
    if by == "file":
        (tmp_path / "classes.txt").write_text("dog\ncat\n")
    splits = table(small, **({"classes": ["dog", "cat"]} if by == "key" else {}))
    assert splits.classes == ("dog", "cat")
    assert splits.train.labels.tolist() == [1, 0]
    assert splits.remarks == ((f"classes in the order of {tmp_path / 'classes.txt'}",) if by == "file" else ())


def test_a_class_that_train_lacks(small: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 3 classes have no image in split 'train' \(owl\); complete it, or set"):
        table(small, classes=["cat", "dog", "owl"])
    assert len(table(small, classes=["cat", "dog", "owl"], absent_classes="allow").classes) == 3


def test_cells_of_labels() -> None:
    assert [label_of_cell(cell) for cell in ("cat", "007", 7, 7.0, True)] == ["cat", "007", "7", "7", "True"]
    for nothing in ("", None, float("nan")):
        with pytest.raises(ValueError, match="the label is empty; write its class, or remove the row"):
            label_of_cell(nothing)
    for other in (0.5, [1], b"x"):
        with pytest.raises(ValueError, match="is no class; use text or whole numbers"):
            label_of_cell(other)


def test_parquet(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write("", "none.txt", ["a.png", "b.png", "v.png", "t.png"])
    file = tmp_path / "labels.parquet"
    columns = {"path": ["a.png", "b.png", "v.png", "t.png"], "split": ["train", "train", "val", "test"]}
    for label in ([7, 10, 7, 10], [7.0, 10.0, 7.0, 10.0], ["7", "10", "7", "10"]):
        pq.write_table(pa.table(columns | {"label": label, "boxes": [[1], [2], [], [3]]}), file)
        splits = table(file)
        assert (splits.classes, splits.train.labels.tolist()) == (("7", "10"), [0, 1])
        assert (names(splits.val), names(splits.test)) == (["v.png"], ["t.png"])
    pq.write_table(pa.table(columns | {"label": pa.array(["x", "y", "x", "y"]).dictionary_encode()}), file)
    assert table(file).classes == ("x", "y")
    pq.write_table(pa.table(columns | {"label": [0.5, None, 1.0, 2.0]}), file)
    with pytest.raises(DataError, match=r"parquet row 1: label 0.5 is no class.*\n.*parquet row 2: the label is empty"):
        table(file)
    for image in ([{"bytes": b"x", "path": "a.png"}], [b"x"]):
        pq.write_table(pa.table({"image": image, "label": [1]}), file)
        with pytest.raises(
            DataError, match=r"'image' holds encoded images .* read it with data.format=hf and data.root"
        ):
            table(file)
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"labels.parquet: cannot be read \(.*\); write it again"):
        table(file)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Parquet needs pyarrow; pip install 'dist-vpt\[parquet\]', or save the table"):
        table(file)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, r"labels.csv: the file is empty; download or copy it again"),
    ("\n \n", {}, r"labels.csv: is empty; add a line of column names, such as image,label"),
    ("image,label\n", {}, r"labels.csv: has no row below its names of columns; add one for each image"),
    ("a.png,cat\nb.png,dog\n", {}, r"labels.csv: its first line has no names of columns but 'a.png'; add a line above"),
    ("image label\na.png cat\n", {}, r"labels.csv: has one column only, 'image label'; separate paths and labels by c"),
    ("image,kind\na.png,cat\n", {}, r"labels.csv: none of its columns 'image', 'kind' has a usual name of the labels; "
     r"set data.table.label"),
    ("photograph,label\na.png,cat\n", {}, r"columns 'photograph', 'label' has a usual name of the images' paths; set "
     r"data.table.image"),
    ("image,path,label\na.png,a.png,cat\n", {}, r"labels.csv: 2 columns could hold the images' paths: image, path; choo"
     r"se one: data.table.image=image"),
    ("image,label,label\na.png,cat,dog\n", {}, r"2 columns could hold the labels: label, label; rename all but one"),
    ("image,label\na.png,cat\n", {"label": "lable"}, r"data.table.label 'lable': .*labels.csv has no such column; did "
     r"you mean 'label'\?"),
    ("image,label\na.png,cat\n", {"label": "image"}, r"column 'image' cannot hold paths and labels; set data.table.la"),
    ("image,label\na.png,cat\nb.png\n", {}, r"labels.csv:3: has 1 field, and the line of column names has 2; put a f"),
    ("image,label\na.png,cat\nb, c.png,dog\n", {}, r"labels.csv:3: has 3 fields, and the line of column names has 2"),
    ('image,label\na.png,cat\n"b.png,dog\nt.png,dog\n', {}, r"labels.csv:3: the line cannot be read \(unexpected end of"
     r" data\); close the quotes"),
    ("image,label\na.png,cat\nb.png,\n", {}, r"labels.csv:3: the label is empty; write its class, or remove the row"),
    ("image,label\na.png,cat\n,dog\n", {}, r"labels.csv:3: the image's path is empty; write it, or remove the row"),
    ("image,label\na.png,cat\nhttps://x.org/b.png,dog\n", {}, r"labels.csv:3: 'https://x.org/b.png' is an address; "),
    ("image,label\na.png,cat\n../b.png,dog\n", {}, r"labels.csv:3: path '../b.png' leaves the dataset's folder; use"),
    ("image,label\na.png,cat\nC:\\data\\b.png,dog\n", {}, r"labels.csv:3: path 'C:.*b.png' leaves the dataset's fol"),
    ("image,label\na.png,cat\n/data/b.png,dog\n", {}, r"labels.csv:3: '/data/b.png' is not below .*; data.table.ima"),
    ("image,label\na.png,cat\nb.png,cat\n", {}, r"labels.csv: has one class only, 'cat', in all 2 rows of train; ad"),
    ("image,label\na.png,cat\nb.png,dog\na.png,dog\n", {}, r"labels.csv:4: 'a.png' has the label 'dog', and 'cat' in li"
     r"ne 2; an image has one label"),
    ("image,label\na.png,cat\nx.png,dog\ny.png,dog\nz.png,dog\nu.png,cat\n", {}, r"labels.csv: 4 of 5 images do not "
     r"exist in .* or .*/images: 'x.png' \(line 3\), 'y.png' \(line 4\), 'z.png' \(line 5\), ...; restore them, remo"),
    ("image,label\na.png,cat\nc.png,dog\n", {}, r"1 of 2 images do not exist in .*: 'c.png' \(line 3\); data.table.ima"
     r"ges=more finds c.png"),
    ("image,label\na.png,cat\nb,dog\n", {}, r"1 of 2 images .*: 'b' \(line 3\); data.table.suffix=.png finds b.png"),
    ("image,label\na.png,cat\nb.png,dog\n", {"images": "mor"}, r"data.table.images 'mor': .*/mor is not a folder; d"),
    ("image,label,split\na.png,cat,train\nb.png,dog,extra\n", {}, r"labels.csv: column 'split': 'extra' is no split; "
     r"name those to use: 'data.table.splits=\{train: ..., val: ..., test: ...\}', or set data.table.split=none"),
    ("image,label,split\na.png,cat,train\nb.png,dog,\n", {}, r"labels.csv:3: the row has no value in the split column"),
    ("image,label,split\na.png,cat,dev\nb.png,dog,val\n", {}, r"'dev' and 'val' could both be the split 'val'; choose"),
    ("image,label,split\na.png,cat,test\nb.png,dog,val\n", {}, r"no row is in split 'train', but in val and test; add"),
    ("image,label,split\na.png,cat,train\n", {"splits": {"val": "vall"}}, r"data.table.splits.val 'vall': .* column "
     r"'split' has no such value; valid: train"),
    ("image,label,split\na.png,cat,train\nb.png,dog,train\nt.png,dgo,val\nv.png,dgo,val\n", {}, r"labels.csv:4: label "
     r"'dgo' has no image in train, as in 1 more rows of val; did you mean 'dog'\?"),
    ("image,label\na.png,cat\nb.png,dgo\n", {"classes": ["cat", "dog"]}, r"labels.csv:3: label 'dgo' is none of the "
     r"classes of data.table.classes; did you mean 'dog'\?"),
    ("image,label\na.png,1\nb.png,2\n", {"classes": ["cat", "dog"]}, r"labels.csv:3: label '2' is out of range: data.ta"
     r"ble.classes names 2 classes, with the numbers 0 to 1; name all of them"),
    ("image,label\na.png,cat\n", {"classes": ["cat", "cat"]}, r"data.table.classes: class 'cat' occurs twice; name ea"),
    ("version https://git-lfs.github.com/spec/v1\noid\n", {}, r"labels.csv: a pointer of Git LFS in place of the file"),
    ("<!DOCTYPE html>\n", {}, r"labels.csv: a web page in place of the file; download the file itself"),
    ("PK\x03\x04", {}, r"labels.csv: is no text but a workbook; save it as CSV \(UTF-8\)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "keys", "message"), MISTAKES, ids=lambda value: repr(value)[:40])
def test_mistakes(text: str, keys: dict[str, Any], message: str, write: Write) -> None:
    file = write(text, images=["a.png", "b.png", "t.png", "v.png", "more/c.png"])
    with pytest.raises(DataError) as caught:
        table(file, **keys)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_all_rows_with_mistakes_are_in_one_message(write: Write) -> None:
    file = write("image,label\n" + "".join(f"http://x/{i}.png,cat\n" for i in range(50)))
    with pytest.raises(DataError) as caught:
        table(file)
    lines = str(caught.value).splitlines()
    assert (len(lines), lines[-1]) == (11, "... and 40 more, 50 in all")


@pytest.mark.parametrize(
    ("files", "root", "keys", "message"),
    [
        ([], "", {}, r"data.root '.*': the folder holds no table \(.csv, .tsv, .parquet\); give the file, data.root"),
        (["a.csv", "b.tsv"], "", {}, r"the folder holds 2 tables \(a.csv, b.tsv\); give the file, data.root=FILE"),
        (["train.csv", "training.tsv"], "", {}, r"train.csv and training.tsv could both be the split 'train'; choose"),
        (["test.csv", "val.csv"], "", {}, r"has val.csv, test.csv but no train.csv; add it, or name the files"),
        (["labels.csv"], "lables.csv", {}, r"lables.csv does not exist; did you mean 'labels.csv'\?"),
        (["labels.xlsx"], "labels.xlsx", {}, r"labels.xlsx: is no table that is read \(.csv, .* save it as CSV \(UT"),
        (["labels.json"], "labels.json", {}, r"labels.json: is no table that is read .*; give one of these"),
        (["train.csv", "b.csv"], "", {"splits": {"train": "train.csv", "test": "c.csv"}}, r"data.table.splits.test '"
         r"c.csv': there is no such file in"),
        (["a.csv", "b.csv"], "", {"splits": {"val": "a.csv"}}, r"data.table.splits: has no train; name the file to "),
        (["train.csv"], "", {"split": "split"}, r"data.table.split 'split': .*train.csv is split 'train' as a whole"),
    ],
)  # fmt: skip
def test_mistakes_in_folders(files: list[str], root: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("image,label\na.png,cat\n")
    with pytest.raises(DataError, match=message):
        table(tmp_path / root, **keys)


def test_a_table_is_checked_without_its_images(small: Path) -> None:
    for image in small.parent.glob("*.png"):
        image.unlink()
    config = DataConfig(task="mine", format="table", root=str(small))
    check_root(config, test=True)
    small.write_text("image,label,split\na.png,cat,train\nb.png,dog,train\n")
    check_root(config, test=False)
    with pytest.raises(DataError, match=r"split 'test' is missing: .*labels.csv has no row of split 'test'; add it"):
        check_root(config, test=True)

"""WebDataset shards: what is read, against the library itself, and every mistake that is reported."""

import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import check_root, open_splits, tar_index
from dist_vpt.data.loaders import TrainBatches
from dist_vpt.data.splits import Split, Splits
from dist_vpt.data.tasks import Task
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError

Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (value, 0, 0)).save(content, "PNG")
    return content.getvalue()


def pack(file: Path, members: Members, mode: Any = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def samples(values: range | list[int], classes: int = 2) -> Members:
    """An image and a label for each value."""
    return [
        member
        for value in values
        for member in ((f"{value:04d}.png", png(value)), (f"{value:04d}.cls", str(value % classes).encode()))
    ]


def opened(root: Path, **keys: Any) -> Splits:
    common = {name: keys.pop(name) for name in ("val_fraction", "test_fraction", "absent_classes") if name in keys}
    return open_splits(DataConfig(task="mine", format="webdataset", root=str(root), webdataset=keys, **common))


def grays(split: Split | None) -> list[int]:
    assert split is not None
    return [int(np.asarray(split.read(i))[0, 0, 0]) for i in range(len(split))]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Shards of train, val and test."""
    root = tmp_path / "data"
    pack(root / "train-0000.tar", samples(range(8)))
    pack(root / "train-0001.tar", samples(range(8, 12)))
    pack(root / "val-0000.tar", samples([20, 21]))
    pack(root / "test-0000.tar", samples([30, 31, 32]))
    return root


def test_splits_are_those_of_the_shards(three: Path) -> None:
    splits = opened(three)
    assert splits.classes == ("0", "1")
    assert grays(splits.train) == list(range(12))
    assert splits.train.labels.tolist() == [value % 2 for value in range(12)]
    assert (grays(splits.val), grays(splits.test)) == ([20, 21], [30, 31, 32])
    assert splits.train.where(9) == f"{three / 'train-0001.tar'} sample 0009"
    assert (splits.storage, splits.missing) == ("webdataset", {})
    assert len({splits.train.source.identity(i) for i in range(12)}) == 12


def test_as_the_library_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    root = tmp_path / "data"
    root.mkdir()
    with webdataset.ShardWriter(str(root / "train-%04d.tar"), maxcount=7, verbose=0) as sink:
        for i in range(20):
            sink.write({"__key__": f"a/{i:03d}", "png": Image.new("RGB", (5 + i, 4), (i, 2 * i, 0)), "cls": i % 3,
                        "json": {"text": "x" * i}})  # fmt: skip
    files = sorted(map(str, root.glob("*.tar")))
    found = opened(root).trainval
    library = webdataset.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "cls")
    rows = list(library)
    assert len(rows) == len(found) == 20
    for i, (key, image, label) in enumerate(rows):
        assert found.where(i).endswith(f" sample {key}")
        assert np.array_equal(np.asarray(found.read(i)), np.asarray(image))
        assert found.labels[i] == label


def test_without_splits_val_and_test_are_split_off(tmp_path: Path) -> None:
    pack(tmp_path / "data/part-0.tar", samples(range(30)))
    splits = opened(tmp_path / "data", val_fraction=0.1, test_fraction=0.2)
    assert splits.held_out == ("test", "val")
    assert sorted(grays(splits.trainval) + grays(splits.test)) == list(range(30))


@pytest.mark.parametrize(
    "names",
    [
        ("train/00.tar", "valid/00.tar", "test/00.tar"),
        ("imagenet-train-000000.tar", "imagenet-val-000000.tar", "imagenet-test-000000.tar"),
        ("TRAIN.tar", "Validation.tar", "Test.tar"),
    ],
)
def test_names_of_splits(names: tuple[str, str, str], tmp_path: Path) -> None:
    for k, name in enumerate(names):
        pack(tmp_path / "data" / name, samples(range(10 * k, 10 * k + 2)))
    pack(tmp_path / "data" / "extra.tar", samples([90, 91]))
    splits = opened(tmp_path / "data")
    assert [grays(splits[name]) for name in ("train", "val", "test")] == [[0, 1], [10, 11], [20, 21]]
    assert splits.remarks == (f"{tmp_path / 'data'}: shards of no split, which are not read: 1",)
    chosen = opened(tmp_path / "data", splits={"train": "*.tar", "val": names[1]})
    assert {90, 91} <= set(grays(chosen.train))
    assert "test" in chosen.missing


def test_a_shard_of_two_splits_is_told(tmp_path: Path) -> None:
    for number in range(3):
        pack(tmp_path / f"data/{number}.tar", samples(range(10 * number, 10 * number + 2)))
    first = tmp_path / "data/0.tar"
    splits = opened(tmp_path / "data", splits={"train": "*.tar", "val": "[01].tar", "test": "2.tar"})
    assert splits.remarks == (
        f"test has {tmp_path / 'data/2.tar'}, which train has, too: its scores are too good; give each shard to one "
        "split",
        f"val has {first} and 1 more, which train has, too: its scores are too good; give each shard to one split",
    )
    where = first.as_uri().removesuffix("/0.tar")
    streamed = open_splits(
        DataConfig(task="mine", format="webdataset", root=where, webdataset={"splits": {"train": "{0,0,1}.tar"}}),
        Task(name="mine", format="webdataset"),
    )
    assert streamed.remarks[0] == f"train has {first.as_uri()} more than once: name each shard once"


@pytest.mark.parametrize(
    ("members", "keys"),
    [
        ([("a.png", png(1)), ("a.json", b'{"label": "cat", "id": 7}')], {}),
        ([("a.png", png(1)), ("a.json", b'{"label": "cat", "category": "dog"}')], {"label": "json.label"}),
        ([("a.png", png(1)), ("a.txt", b"cat\n")], {"label": "txt"}),
        ([("a.PNG", png(1)), ("a.CLS", b" cat ")], {}),
        ([("./", b""), ("./README", b"x"), ("./a.cls", b"cat"), ("./a.png", png(1))], {}),
        ([("a.input.png", png(1)), ("a.mask.png", png(2)), ("a.cls", b"cat")], {"image": "input.png"}),
        ([("a.png", png(1)), ("a.cls", b"cat"), ("a.seg.npy", b"...")], {}),
    ],
)  # fmt: skip
def test_samples_as_people_write_them(members: Members, keys: dict[str, Any], tmp_path: Path) -> None:
    other = [(name.replace("a.", "b."), content.replace(b"cat", b"dog")) for name, content in members]
    other = [(name, png(3) if name.lower().endswith("png") and "mask" not in name else each) for name, each in other]
    for split in ("train", "val", "test"):
        pack(tmp_path / f"data/{split}.tar", [*members, *other])
    train = opened(tmp_path / "data", **keys).train
    assert grays(train) == [1, 3]
    assert opened(tmp_path / "data", **keys).classes == ("cat", "dog")


@pytest.mark.parametrize("by", ["key", "file"])
def test_numbers_get_names(by: str, three: Path) -> None:
    if by == "file":
        (three / "classes.txt").write_text("even\nodd\n")
    splits = opened(three, **({"classes": ["even", "odd"]} if by == "key" else {}))
    assert splits.classes == ("even", "odd")
    assert splits.train.labels.tolist() == [value % 2 for value in range(12)]


def test_an_index_is_kept_until_the_shard_changes(three: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened(three)
    scanned = []
    scan = tar_index._scanned
    monkeypatch.setattr(tar_index, "_scanned", lambda shard, *more: scanned.append(shard.name) or scan(shard, *more))
    assert grays(opened(three).train) == list(range(12))
    assert scanned == []
    pack(three / "train-0001.tar", samples(range(40, 44)))
    assert grays(opened(three).train) == [*range(8), *range(40, 44)]
    assert scanned == ["train-0001.tar"]
    for kept in (tmp_path / "cache/dist_vpt/webdataset").glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:50])
    scanned.clear()
    assert grays(opened(three).test) == [30, 31, 32]
    assert len(scanned) == 4
    monkeypatch.setattr(tar_index, "cache_folder", lambda: None)
    assert grays(opened(three).test) == [30, 31, 32]


def test_a_test_without_labels_is_missing(three: Path) -> None:
    pack(three / "test-0000.tar", [("0.png", png(1)), ("1.png", png(2))])
    with pytest.raises(
        DataError, match=r"'test' is missing: .*test-0000.tar: samples of test have no cls; add it, or s"
    ):
        opened(three)["test"]
    (three / "test-0000.tar").unlink()
    with pytest.raises(
        DataError, match=r"'test' is missing: .*/data has no shards of test; add them, or set train.tes"
    ):
        opened(three)["test"]


def _cut(size: int) -> Callable[[Path], None]:
    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:size])

    return cut


MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ([("a.png", png(1)), ("a.txt", b"cat")], {}, r"train-0000.tar sample a: has no .cls, and no field of .json with a u"
     r"sual name of labels \(png, txt\); set data.webdataset.label"),
    ([("a.png", png(1)), ("a.json", b'{"x": 1}')], {}, r"sample a: has no .cls, .* \(json, png; json has x\); set"),
    ([("a.png", png(1)), ("a.json", b"[1]")], {}, r"train-0000.tar sample a: its .json is no object; write"),
    ([("a.png", png(1)), ("a.json", b'{"x": 1}')], {"label": "json.y"}, r"sample a: its .json has no field 'y'; val"),
    ([("a.png", png(1)), ("a.json", b'{"x": [1]}')], {"label": "json.x"}, r"field 'x' of its .json is '\[1\]'; a la"),
    ([("a.png", png(1)), ("a.cls", b"\xff\xfe")], {}, r"sample a: its .cls is not UTF-8 text; choose another"),
    ([*samples([0, 1]), ("b.png", png(1))], {}, r"sample b: has no label \(cls\); add it, or remove the sample"),
    ([*samples([0, 1]), ("b.cls", b"1")], {}, r"train-0000.tar sample b: has no image but cls; remove the sample, o"),
    ([("b.png", png(1)), ("b.jpg", png(1)), ("b.cls", b"1")], {}, r"sample b: has 2 images, png, jpg; choose one: d"),
    (samples([0, 1]), {"image": "jpg"}, r"sample 0000: has no .jpg but png, cls; fix data.webdataset.image"),
    ([("a.png", png(1)), ("a.cls", b"0"), ("a.png", png(2)), ("a.cls", b"1")], {}, r"train-0000.tar sample a: has two m"
     r"embers .png, so two samples may have one name; write each sample under a name of its own"),
    ([], {}, r"train-0000.tar: holds no sample; remove it, or write it again"),
    (samples([0, 2]), {}, r"val-0000.tar sample 0021: label '1' has no image in train; valid: 0"),
    (samples([0, 1]), {"classes": ["a", "b"], "label": "cls", "image": None, "more": 2}, r"label 2 is out of range:"),
    (samples([0, 1]), {"classes": ["a", "a"]}, r"data.webdataset.classes: a class occurs twice; name each class once"),
    (samples([0, 1]), {"splits": {"train": "tain-*.tar"}}, r"data.webdataset.splits.train 'tain-\*.tar': matches no"),
    (samples([0, 1]), {"splits": {"train": "train-{0000..0003}.tar"}}, r"must be a pattern of files below data.root"),
    (samples([0, 1]), {"splits": {"train": "s3://x/*.tar"}}, r"must be a pattern of files below data.root with \* and"),
    (samples([0, 1]), {"splits": {"val": "val-*.tar"}}, r"data.webdataset.splits: has no train; name its shards"),
    ("w:gz", {}, r"train-0000.tar: is compressed \(gzip\), and samples are read at their place in the file; decompr"),
    (_cut(700), {}, r"train-0000.tar: is no whole tar file \(unexpected end of data\); copy it again"),
    (_cut(1024), {}, r"train-0000.tar: ends without the mark of its end, so it was cut off; copy it again"),
    (_cut(0), {}, r"train-0000.tar: the file is empty; download or copy it again"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "keys", "message"), MISTAKES, ids=[message[:40] for *_, message in MISTAKES])
def test_mistakes(change: Any, keys: dict[str, Any], message: str, three: Path) -> None:
    (three / "train-0001.tar").unlink()
    if keys.pop("more", None):
        pack(three / "val-0000.tar", samples([22], classes=20))
    if callable(change):
        change(three / "train-0000.tar")
    elif isinstance(change, str):
        pack(three / "train-0000.tar", samples([0, 1]), change)
    else:
        pack(three / "train-0000.tar", change)
    with pytest.raises(DataError) as caught:
        opened(three, **keys)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_mistakes_that_need_no_shard(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar.gz").write_bytes(b"x")
    config = DataConfig(task="mine", format="webdataset", root=str(tmp_path))
    with pytest.raises(DataError, match=r"has no .tar in it or in its folders but 1 .tar.gz; give the folder of the"):
        check_root(config, test=True)
    (tmp_path / "val-0.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has shards of val but none of train; name them: 'data.webdataset.splits="):
        check_root(config, test=True)


def test_a_shard_that_is_cut_off_later(three: Path) -> None:
    splits = opened(three)
    shard = three / "train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:520])
    with pytest.raises(DataError, match=r"train-0001.tar sample 0008: the shard ends before its end; copy it again"):
        splits.train.read(8)
    shard.unlink()
    with pytest.raises(
        DataError, match=r"sample 0009: cannot be read \(No such file or directory\); restore the shard"
    ):
        splits.train.read(9)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_images_as_files(workers: int, three: Path, tmp_path: Path) -> None:
    """In the same order, from any step on, in this process or in workers."""
    for value in range(12):
        file = tmp_path / f"files/train/{value % 2}/{value:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(value))
    files = open_splits(DataConfig(task="mine", format="image_folder", root=str(tmp_path / "files"))).trainval
    order = np.argsort([Path(files.where(i)).stem for i in range(12)])
    transform = ImageTransform(8, "bilinear", "crop", "fgvc")
    wanted = TrainBatches(files.subset("train", order), transform, batch_size=4, seed=3)
    shards = TrainBatches(opened(three).train, transform, batch_size=4, seed=3, workers=workers)
    expected = [batch for (batch,) in wanted.epoch(1)]
    for start in (0, 2):
        found = [batch for (batch,) in shards.epoch(1, start)]
        assert len(found) == 3 - start
        for one, other in zip(found, expected[start:], strict=True):
            assert all(one[name].equal(other[name]) for name in ("images", "labels", "weight", "index"))
    shards.close()

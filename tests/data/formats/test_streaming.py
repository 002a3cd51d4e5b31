"""Streamed data: the same pictures and labels as from files, what is fetched for them, and what is said of mistakes."""

import contextlib
import io
import itertools
import logging
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data import addresses
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import check_root, open_splits, tar_spans
from dist_vpt.data.formats.tar_index import FIRST_BLOCK
from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.pieces import GIB, Pieces
from dist_vpt.data.splits import Split, Splits
from dist_vpt.data.streaming import mixed_share
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError, SourceUnavailable, UserError
from dist_vpt.files import locked
from tests.data.formats.test_webdataset import pack, samples
from tests.range_server import Server, serving

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

TRAIN, ROWS, SIDE = 96, 4, 48  # images of train, of a row group; pixels
PLAIN = ImageTransform(SIDE, "bilinear", "squash", "none")
VIEW = ImageTransform(24, "bilinear", "crop", "fgvc")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "WAITS", (0.01,))
    monkeypatch.setattr(tar_spans, "SPAN", 40_000)
    datasets.disable_progress_bars()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


def noise(i: int) -> Image.Image:
    """A picture that does not compress."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def encoded(i: int) -> bytes:
    content = io.BytesIO()
    noise(i).save(content, "PNG")
    return content.getvalue()


def table(first: int, count: int) -> Any:
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    values = range(first, first + count)
    columns = {"picture": [noise(i) for i in values], "kind": [i % 2 for i in values]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def parquet(found: Any, rows: int = ROWS) -> bytes:
    content = io.BytesIO()
    found.to_parquet(content, batch_size=rows)
    return content.getvalue()


PARTS = {"train-0": (0, 56), "train-1": (56, 40), "val": (200, 6), "test": (300, 6)}
TABLES: dict[str, bytes] = {}


def files(storage: str) -> dict[str, bytes]:
    if not TABLES:
        TABLES.update({f"{name}.parquet": parquet(table(*part)) for name, part in PARTS.items()})
    if storage == "hf":
        return dict(TABLES)
    found = {}
    for name, (first, count) in PARTS.items():
        members = [
            member
            for i in range(first, first + count)
            for member in ((f"{i:04d}.png", encoded(i)), (f"{i:04d}.cls", str(i % 2).encode()))
        ]
        found[f"{name}.tar"] = _packed(members)
    return found


def _packed(members: list[tuple[str, bytes]]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return pack(Path(folder) / "a.tar", members).read_bytes()


def keys(storage: str, server: Server, **changes: Any) -> dict[str, Any]:
    suffix = "parquet" if storage == "hf" else "tar"
    splits = {"train": f"train-{{0..1}}.{suffix}", "val": f"val.{suffix}", "test": f"test.{suffix}"}
    own = {"hf": {"splits": splits}, "streaming": True} if storage == "hf" else {"webdataset": {"splits": splits}}
    return {"task": "mine", "format": storage, "root": f"{server.address}/d", **own, **changes}


@pytest.fixture(params=["hf", "webdataset"])
def storage(request: pytest.FixtureRequest, server: Server) -> str:
    for name, content in files(request.param).items():
        server.put(f"d/{name}", content)
    return str(request.param)


@pytest.fixture
def opened(storage: str, server: Server) -> Callable[..., Splits]:
    """Opens what the server has, shuffled with 24 others."""
    return lambda **changes: open_splits(DataConfig(**{**keys(storage, server), "streaming_shuffle": 24, **changes}))


def pixels(split: Split | None) -> list[np.ndarray]:
    assert split is not None
    return [np.asarray(split.read(i)) for i in range(len(split))]


def pieces_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache/dist_vpt/pieces"


def remove_pieces(tmp_path: Path) -> None:
    """Those that the index has kept."""
    for file in pieces_folder(tmp_path).iterdir():
        file.unlink()


def taken(tmp_path: Path) -> int:
    folder, sizes = pieces_folder(tmp_path), []
    with locked(folder / "room.lock", "", timeout=-1):  # or a piece that gets its name meanwhile counts twice
        for file in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # one that could not be fetched
                sizes.append(file.stat().st_size if file.suffix != ".lock" else 0)
    return sum(sizes)


def test_pictures_and_labels_are_those_of_the_files(opened: Callable[..., Splits], storage: str) -> None:
    splits = opened()
    assert splits.classes == (("cat", "dog") if storage == "hf" else ("0", "1"))
    for name, values in (("train", range(TRAIN)), ("val", range(200, 206)), ("test", range(300, 306))):
        split = splits[name]
        assert split.labels.tolist() == [i % 2 for i in values]
        for i, found in zip(values, pixels(split), strict=True):
            assert np.array_equal(found, np.asarray(noise(i)))
    assert len({splits.train.source.identity(i) for i in range(TRAIN)}) == TRAIN
    ending = "train-1.parquet record 4" if storage == "hf" else "train-1.tar sample 0060"
    assert splits.train.where(60).endswith(ending)
    assert len(pickle.dumps(splits.train)) < 8000


def test_what_is_fetched(opened: Callable[..., Splits], storage: str, server: Server, tmp_path: Path) -> None:
    splits = opened()
    name = "d/train-0.parquet" if storage == "hf" else "d/train-0.tar"
    read = server.bytes_sent(name)
    if storage == "hf":  # the end of the file, and the labels
        assert read < 2**16 + 2000 < len(server.files[name]) / 3
    else:  # the shard once, and its first sample for the name of the labels
        assert read <= len(server.files[name]) + 2 * FIRST_BLOCK
    server.sent.clear()
    opened()
    assert server.sent == []
    pixels(splits.train)
    if storage == "webdataset":  # kept while it was indexed
        assert server.sent == []
        remove_pieces(tmp_path)
        pixels(splits.train)
    assert len(server.sent) == len(set(server.sent)) == len(np.unique(splits.train.source.pieces.piece_n))  # type: ignore[attr-defined]
    assert server.bytes_sent() < sum(len(content) for key, content in server.files.items() if "train" in key)


def put_shards(server: Server) -> int:
    """Shards that are larger than all that is fetched besides; returns their bytes."""
    for name, first, count in (("train-0", 0, 300), ("train-1", 300, 200), ("val", 500, 60)):
        each = ((f"{i}.png", encoded(i), f"{i}.cls", str(i % 2).encode()) for i in range(first, first + count))
        server.put(f"d/{name}.tar", _packed([pair for a, b, c, d in each for pair in ((a, b), (c, d))]))
    return sum(len(content) for content in server.files.values())


SPLITS = {"train": "train-{0..1}.tar", "val": "val.tar"}


def test_shards_that_fit_on_the_disk_are_fetched_once(server: Server) -> None:
    """By the index and an epoch together."""
    total = put_shards(server)
    splits = open_splits(DataConfig(**keys("webdataset", server, webdataset={"splits": SPLITS})))
    assert total < server.bytes_sent() < total + 2 * FIRST_BLOCK
    for batches in (TrainBatches(splits.train, VIEW, batch_size=10), EvalBatches(splits["val"], PLAIN, 10)):
        list(batches.epoch(0) if isinstance(batches, TrainBatches) else batches)
    assert server.bytes_sent() < total + 2 * FIRST_BLOCK
    assert np.array_equal(pixels(splits.train)[450], np.asarray(noise(450)))


def test_shards_that_do_not_fit_are_kept_as_far_as_they_do(server: Server, tmp_path: Path) -> None:
    total, first = put_shards(server), len(server.files["d/train-0.tar"])
    budget = 1.1 * first
    asked = keys("webdataset", server, webdataset={"splits": SPLITS}, streaming_shuffle=10)
    splits = open_splits(DataConfig(**asked, streaming_disk_gib=budget / GIB))
    assert total < server.bytes_sent() < total + 2 * FIRST_BLOCK
    assert 0.9 * first < taken(tmp_path) < budget
    server.sent.clear()
    pixels(splits.train)
    assert {name for name, _, _ in server.sent} == {"d/train-1.tar"}
    assert taken(tmp_path) < budget


def test_members_that_are_skipped_over(server: Server, tmp_path: Path) -> None:
    """What is larger than a block is not fetched for the index; the images around it are fetched when they are read."""
    members = [m for i in range(12) for m in ((f"{i}.png", encoded(i)), (f"{i}.cls", str(i % 2).encode()))]
    members[8:8] = [("3.npy", bytes(100_000)), ("3.txt", b"x")]  # of the sample before
    server.put("d/train.tar", _packed(members))
    own = {"splits": {"train": "train.tar", "val": "train.tar"}, "image": "png"}
    splits = open_splits(DataConfig(**keys("webdataset", server, webdataset=own)))
    assert server.bytes_sent() < len(server.files["d/train.tar"]) - 60_000 + FIRST_BLOCK
    assert taken(tmp_path) > 0
    assert all(np.array_equal(found, np.asarray(noise(i))) for i, found in enumerate(pixels(splits.train)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_fetches_each_piece_once_and_stays_within_its_room(
    workers: int, opened: Callable[..., Splits], server: Server, tmp_path: Path
) -> None:
    budget = 1.2 * max(part.source.pieces.at_once for part in [opened().train]) / GIB  # type: ignore[attr-defined]
    remove_pieces(tmp_path)
    split = opened(streaming_disk_gib=budget).train
    pieces = split.source.pieces  # type: ignore[attr-defined]
    assert pieces.total > budget * GIB  # or nothing would ever be removed
    batches = TrainBatches(split, VIEW, batch_size=8, seed=1, workers=workers)
    server.sent.clear()
    largest, shown = 0, []
    for epoch in range(2):
        for (batch,) in batches.epoch(epoch):
            shown += batch["index"].tolist()
            largest = max(largest, taken(tmp_path))
    batches.close()
    assert sorted(shown[:TRAIN]) == sorted(shown[TRAIN:]) == list(range(TRAIN))
    assert shown[:TRAIN] != shown[TRAIN:]
    assert largest <= budget * GIB
    assert len(server.sent) <= 2 * len(pieces.bytes_G) + 2  # the epochs' ends meet


@pytest.mark.parametrize("sampling", ["shuffle", "balanced"])
def test_batches_from_any_step_and_process(sampling: Any, opened: Callable[..., Splits]) -> None:
    split = opened().train

    def epoch(**options: Any) -> list[Any]:
        start = options.pop("start", 0)
        batches = TrainBatches(split, VIEW, batch_size=8, seed=1, sampling=sampling, **options)
        return [batch for (batch,) in batches.epoch(1, start)]

    whole = epoch()
    for one, other in zip(epoch(start=5), whole[5:], strict=True):
        assert all(one[name].equal(other[name]) for name in ("images", "labels", "index"))
    for first, second, batch in zip(epoch(rank=0, world=2), epoch(rank=1, world=2), whole, strict=True):
        assert sorted([*first["index"].tolist(), *second["index"].tolist()]) == sorted(batch["index"].tolist())


def test_scores_and_caches_read_in_order(opened: Callable[..., Splits], server: Server) -> None:
    split = opened().train
    server.sent.clear()
    found = [batch["index"].tolist() for batch in EvalBatches(split, PLAIN, 10, workers=2)]
    assert list(itertools.chain(*found)) == list(range(TRAIN))
    assert len(server.sent) == len(set(server.sent))


def test_splits_that_are_split_off_and_drawn(opened: Callable[..., Splits], storage: str, server: Server) -> None:
    own = "hf" if storage == "hf" else "webdataset"
    splits = opened(**{own: {"splits": {"train": keys(storage, server)[own]["splits"]["train"]}}}, val_fraction=0.25,
                    shots=5, train_on="trainval", **({"test_fraction": 0.1} if storage == "hf" else {}))  # fmt: skip
    assert "val" in splits.held_out
    assert splits.train.labels.tolist().count(0) == splits.train.labels.tolist().count(1) == 5
    shown = [
        i for (batch,) in TrainBatches(splits.trainval, VIEW, batch_size=6).epoch(0) for i in batch["index"].tolist()
    ]
    assert sorted(i for i in shown if i >= 0) == list(range(len(splits.trainval)))
    assert re.match(
        r"streamed: train .* MiB, val .* MiB.*; at most 20 GiB of them at a time in .*/pieces", splits.remarks[0]
    )


def test_lines_about_splits_that_cost_as_much_as_the_whole(
    opened: Callable[..., Splits], storage: str, server: Server
) -> None:
    own = "hf" if storage == "hf" else "webdataset"
    train = keys(storage, server)[own]["splits"]["train"]
    budget = 0.97 * opened().train.source.pieces.total / GIB  # type: ignore[attr-defined]
    splits = opened(**{own: {"splits": {"train": train}}}, streaming_disk_gib=budget, streaming_shuffle=2)
    assert any(line.startswith("images of val were chosen one by one, so each pass over it") for line in splits.remarks)


def test_a_window_that_does_not_fit(opened: Callable[..., Splits]) -> None:
    with pytest.raises(
        UserError, match=r"data.streaming_disk_gib 0.0001: the 24 images that are shuffled with each other"
    ):
        opened(streaming_disk_gib=0.0001)


def test_pieces_that_fail_are_no_broken_images(opened: Callable[..., Splits], server: Server, tmp_path: Path) -> None:
    """data.on_decode_error=skip passes over images, not over a server that is gone."""
    split = opened().train
    remove_pieces(tmp_path)
    server.gone = True
    batches = TrainBatches(split, VIEW, batch_size=8, on_decode_error="skip")
    with pytest.raises(SourceUnavailable, match=r"train-\d.* cannot be fetched after 2 attempts"):
        next(batches.epoch(0))


def test_a_file_that_changes_between_index_and_read(
    opened: Callable[..., Splits], server: Server, storage: str, tmp_path: Path
) -> None:
    split = opened().train
    remove_pieces(tmp_path)
    name = "d/train-0.parquet" if storage == "hf" else "d/train-0.tar"
    server.files[name] = server.files[name] + b"x"
    with pytest.raises(SourceUnavailable, match=r"train-0.\w+: has changed since this run found it"):
        split.read(0)


def test_files_that_are_cut_off(opened: Callable[..., Splits], server: Server, storage: str) -> None:
    name = "d/train-0.parquet" if storage == "hf" else "d/train-0.tar"
    whole = server.files[name]
    server.files[name] = whole[: len(whole) // 2]
    kind = "is no whole Parquet file; upload or copy it again" if storage == "hf" else "is no whole tar file"
    with pytest.raises(DataError, match=rf"{name}: {kind}"):
        opened()
    server.files[name] = b"<!DOCTYPE html><html></html>"
    with pytest.raises(DataError, match="a web page in place of the file"):
        opened()


def test_classes_from_a_file_behind_the_address(server: Server) -> None:
    for name, content in files("webdataset").items():
        server.put(f"d/{name}", content)
    server.put("d/classes.txt", b"cat\ndog\n")
    assert open_splits(DataConfig(**keys("webdataset", server))).classes == ("cat", "dog")


def test_shards_on_a_server_that_lists_them(tmp_path: Path) -> None:
    pack(tmp_path / "data/train-0.tar", samples(range(20)))
    pack(tmp_path / "data/val/0.tar", samples(range(4)))
    pack(tmp_path / "data/other.tar", samples(range(4)))
    splits = open_splits(DataConfig(task="mine", format="webdataset", root=f"file://{tmp_path}/data"))
    assert (len(splits.train), len(splits["val"])) == (20, 4)
    assert splits.remarks[0].endswith("shards of no split, which are not read: 1")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none': has no .tar in it or in its folders; give the folder of the shards"):
        open_splits(DataConfig(task="mine", format="webdataset", root=f"file://{tmp_path}/none"))


def test_a_local_folder_of_parquet_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, (first, count) in {"train": (0, 20), "validation": (200, 6), "test": (300, 6)}.items():
        (root / f"{name}-00000-of-00001.parquet").write_bytes(parquet(table(first, count)))
    splits = open_splits(DataConfig(task="mine", format="hf", root=str(root), streaming=True))
    assert (splits.classes, len(splits.train)) == (("cat", "dog"), 20)
    assert np.array_equal(np.asarray(splits["val"].read(2)), np.asarray(noise(202)))
    with pytest.raises(DataError, match=r"data.hf.splits.train 'train\[:50%\]': whole splits alone are streamed"):
        open_splits(DataConfig(task="mine", format="hf", root=str(root), streaming=True,
                               hf={"splits": {"train": "train[:50%]"}}))  # fmt: skip


def test_datasets_that_are_not_parquet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    table(0, 4).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="was saved by save_to_disk, so it is read in place; remove data"):
        open_splits(DataConfig(task="mine", format="hf", root=str(tmp_path / "saved"), streaming=True))
    folder = tmp_path / "images/train/cat"
    folder.mkdir(parents=True)
    noise(0).save(folder / "0.png")
    with pytest.raises(
        DataError, match=r"holds '0.png', and Parquet files alone are streamed; use the copy in Parquet"
    ):
        open_splits(DataConfig(task="mine", format="hf", root=str(tmp_path / "images"), streaming=True))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_record(split: str, server: Server) -> None:
    """It would be an error without a message in train, and another val than the recipe's."""
    for name, content in files("hf").items():
        server.put(f"d/{name}", parquet(table(0, 0)) if split in name else content)
    with pytest.raises(DataError, match=rf"split '{split}': has no record; add some, or leave it out of data.hf.spl"):
        open_splits(DataConfig(**keys("hf", server)))


def _stored(values: list[Any], kind: Any) -> bytes:
    import pyarrow as pa

    content = io.BytesIO()
    columns = {"picture": pa.array(values, kind), "kind": pa.array([str(i % 2) for i in range(len(values))])}
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def test_columns_that_nobody_has_declared(server: Server) -> None:
    """Bytes are images, paths are not followed, and a record without an image is named."""
    import pyarrow as pa

    server.put("d/a.parquet", _stored([encoded(i) for i in range(10)], pa.binary()))
    structure = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows: list[Any] = [{"bytes": encoded(i), "path": None} for i in range(8)]
    server.put("d/b.parquet", _stored([*rows, None, {"bytes": None, "path": "x.png"}], structure))

    def opened(name: str) -> Splits:
        own = {"splits": {"train": name}, "label": "kind"}
        return open_splits(DataConfig(task="mine", format="hf", root=f"{server.address}/d", streaming=True, hf=own))

    both = opened("a.parquet")
    assert both.classes == ("0", "1")
    assert {found.tobytes() for found in pixels(both.train)} < {np.asarray(noise(i)).tobytes() for i in range(10)}
    every = opened("b.parquet")
    source = every.train.source.source.source  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(source.read(3, 100)), np.asarray(noise(3)))
    with pytest.raises(DataError, match=r"b.parquet record 8: has no image; remove the record"):
        source.read(8, 100)
    with pytest.raises(DataError, match=r"b.parquet record 9: holds the path 'x.png' in place of an image"):
        source.read(9, 100)


def test_files_with_other_columns(server: Server) -> None:
    import pyarrow as pa

    server.put("d/train-0.parquet", parquet(table(0, 8)))
    other = io.BytesIO()
    pq.write_table(pa.table({"kind": [0, 1]}), other)
    server.put("d/train-1.parquet", other.getvalue())
    with pytest.raises(DataError, match=r"train-1.parquet: has no column 'picture'; write all files of a split"):
        open_splits(DataConfig(**keys("hf", server, hf={"splits": {"train": "train-{0..1}.parquet"}})))


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"root": "https://h/d", "webdataset": {}},
        r"'https://h/d': does not list its files; name the shards of each split",
    ),
    ({"root": "s3://h/d", "webdataset": {"splits": {"val": "a"}}}, "data.webdataset.splits: has no train"),
    ({"root": "s3://h/d", "webdataset": {"splits": {"train": "s3://a"}}}, "must be a pattern of files below data.root"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_that_need_no_server(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_root(DataConfig(task="mine", format="webdataset", **changes), test=True)


def test_a_package_that_is_missing() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/d.*: needs a package that is missing; pip install s3fs"):
        open_splits(DataConfig(task="mine", format="webdataset", root="s3://bucket/d"))
    with pytest.raises(DataError, match=r"nowhere://bucket/d.*: .*use https://, s3://, gs:// or hf://"):
        open_splits(DataConfig(task="mine", format="webdataset", root="nowhere://bucket/d"))


def test_files_in_the_order_of_their_classes() -> None:
    """Well mixed, sorted, and sorted in a window that holds half of all."""
    rows = np.arange(1000)

    def share(labels: np.ndarray, window: int) -> float:
        return mixed_share(Pieces((rows // 20).astype(np.int32), np.ones(50), window, lambda _: None), labels)

    assert share(rows % 10, 100) > 0.99
    assert share(np.random.default_rng(0).integers(0, 100, 1000), 200) > 0.95
    assert share(rows // 100, 100) < 0.5  # 5 pieces of 10 classes: 4.1 of 10
    assert share(rows // 100, 500) > 0.95
    assert share(rows // 100, 5000) == 1


def test_sorted_files_give_a_warning(server: Server) -> None:
    members = [m for k in range(48) for m in ((f"{k}.png", encoded(k)), (f"{k}.cls", str(k // 12).encode()))]
    mixed = [m for k in range(48) for m in ((f"{k}.png", encoded(k)), (f"{k}.cls", str(k % 4).encode()))]
    for name, found in (("sorted", members), ("mixed", mixed)):
        server.put(f"d/{name}.tar", _packed(found))
    for name in ("sorted", "mixed"):
        own = {"splits": {"train": f"{name}.tar", "val": "mixed.tar"}}
        splits = open_splits(DataConfig(**keys("webdataset", server, webdataset=own, streaming_shuffle=6)))
        warned = any("images of a class are stored next to each other: the 6 images" in line for line in splits.remarks)
        assert warned == (name == "sorted")

"""Prepared TFDS directories in both formats against a plain reading of the protocol."""

import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits, tfds
from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.splits import Splits
from dist_vpt.data.tasks import TASKS
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError, UserError
from tests.data.tfds_copies import as_tfrecord, prepare
from tests.reference import vtab

pytestmark = pytest.mark.slow

VTAB = [name for name, row in TASKS.items() if row.tfds]
FORMATS = ("array_record", "tfrecord")


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All builders, prepared in both formats."""
    made = prepare(tmp_path_factory.mktemp("array_record"))
    return {"array_record": made, "tfrecord": as_tfrecord(made, tmp_path_factory.mktemp("tfrecord"))}


@pytest.fixture
def own_copy(tmp_path: Path, copies: dict[str, Path]) -> Callable[[str, str], Path]:
    """A copy of one builder, to be spoilt."""

    def copied(kind: str, builder: str) -> Path:
        shutil.copytree(copies[kind] / builder, tmp_path / builder)
        return tmp_path

    return copied


def opened(task: str, root: Path, **settings: Any) -> Splits:
    return open_splits(DataConfig(task=task, root=str(root), **{"check_counts": False, **settings}))


def test_there_are_nineteen_tasks_in_three_groups() -> None:
    assert list(vtab.BUILDERS) == VTAB
    groups = [TASKS[name].group for name in VTAB]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]


@pytest.mark.parametrize("task", VTAB)
def test_slices_labels_and_images_are_the_protocols(task: str, copies: dict[str, Path]) -> None:
    wanted = vtab.examples(task, copies["array_record"])
    wanted["trainval"] = wanted["train"] + wanted["val"]
    for kind in FORMATS:
        splits = opened(task, copies[kind])
        assert len(splits.classes) == TASKS[task].classes
        assert splits.storage.startswith(f"tfds {vtab.BUILDERS[task]}:")
        assert splits.storage.endswith(f"({kind})")
        for name, pairs in wanted.items():
            split = splits[name]
            assert len(split) == len(pairs)
            assert split.labels.tolist() == [label for label, _ in pairs]
            for i in range(0, len(pairs), 41):
                assert np.array_equal(np.asarray(split.read(i)), pairs[i][1])
    assert len(wanted["train"]) == 800
    assert len(wanted["val"]) == 200


PUBLISHED = {  # examples of the real datasets -> where val begins and where test does
    "cifar100": ({"train": 50000, "test": 10000}, 45000, 0),
    "caltech101": ({"train": 3060, "test": 6084}, 2754, 0),
    "svhn": ({"train": 73257, "test": 26032}, 65931, 0),
    "oxford_iiit_pet": ({"train": 3680, "test": 3669}, 2944, 0),
    "eurosat": ({"train": 27000}, 16200, 21600),
    "resisc45": ({"train": 31500}, 18900, 25200),
    "clevr_count": ({"train": 70000, "validation": 15000}, 63000, 0),
    "dsprites_loc": ({"train": 737280}, 589824, 663552),
    "smallnorb_azi": ({"train": 24300, "test": 24300}, 0, 12150),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_slices_of_the_real_datasets(task: str) -> None:
    n, val, test = PUBLISHED[task]
    row = TASKS[task].tfds
    assert row is not None
    assert row.val.bounds(n[row.val.split]) == (val, val + 200)
    start, stop = row.test.bounds(n[row.test.split])
    assert start == test
    assert stop - start == dict(TASKS[task].expected_counts)["test"]


def feature(**lists: Any) -> Any:
    values = {name: SimpleNamespace(value=value) for name, value in lists.items()}
    return SimpleNamespace(**values)


@pytest.mark.parametrize("edge", [8.0, 8.5, 9.0, 9.5, 10.0])
def test_edges_of_clevr_bins(edge: float) -> None:
    for distance in (*np.nextafter(np.float32(edge), np.float32([0, 100])).tolist(), edge):
        places = feature(float_list=[5.0, 5.0, 60.0, 1.0, 2.0, distance])
        assert tfds.LABELS["clevr_dist"]({"objects/pixel_coords": places}) == vtab.clevr_bin(distance)


@pytest.mark.parametrize("edge", [8.0, 20.0, 999.0])
def test_edges_of_kitti_bins(edge: float) -> None:
    for distance in (*np.nextafter(np.float32(edge), np.float32([0, 2000])).tolist(), edge):
        types, places = feature(int64_list=[3, 1, 7]), feature(float_list=[0, 0, 1.0, 0, 0, distance, 0, 0, 2.0])
        found = tfds.LABELS["kitti"]({"objects/type": types, "objects/location": places})
        assert found == vtab.kitti_bin(min(distance, 1000.0))
    nothing = {"objects/type": feature(int64_list=[4]), "objects/location": feature(float_list=[0.0, 0.0, 3.0])}
    assert tfds.LABELS["kitti"](nothing) == 3
    assert (
        tfds.LABELS["kitti"]({"objects/type": feature(int64_list=[]), "objects/location": feature(float_list=[])}) == 3
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_workers_read_after_the_parent_did(kind: str, copies: dict[str, Path]) -> None:
    split = opened("caltech101", copies[kind]).train
    split.read(0)
    view = ImageTransform(32, "vpt")
    alone, shared = (TrainBatches(split, view, batch_size=100, workers=workers) for workers in (0, 2))
    for a, b in zip(alone.epoch(0), shared.epoch(0), strict=True):
        assert (a[0]["images"] == b[0]["images"]).all()
        assert a[0]["labels"].tolist() == b[0]["labels"].tolist()
    alone.close()
    shared.close()


def test_labels_are_read_when_asked_for(copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tfds.TfdsSource, "labels", lambda self: asked.append(self) or np.zeros(60, np.int64))
    splits = opened("dtd", copies["tfrecord"])
    assert len(splits["test"]) == 60
    assert len(splits.trainval) == 1000
    assert not asked
    assert splits["test"].labels.tolist() == [0] * 60
    assert len(pickle.loads(pickle.dumps(splits["test"])).labels) == 60
    assert len(asked) == 1


def test_tensorflow_is_never_imported(copies: dict[str, Path], tmp_path: Path) -> None:
    """A stand-in shows when it is imported, in workers too; without it, nothing is missed either."""
    fake = tmp_path / "fake" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\nraise ImportError('no tensorflow')\n"
    )
    words = [
        "train", "method.name=linear", "data.task=svhn", f"data.root={copies['array_record']}",
        "data.check_counts=false", "data.workers=1", "train.epochs=1", "optim.warmup_epochs=0", "run.trackers=[]",
        f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(fake.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "dist_vpt", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_the_package_needs_no_tfds() -> None:
    code = """
import sys
sys.modules['tensorflow_datasets'] = None
import dist_vpt.cli.main, dist_vpt.recipe.loading, dist_vpt.experiments.sweep, dist_vpt.data.formats.tfds
from dist_vpt.errors import UserError
try:
    dist_vpt.data.formats.tfds.packages()
except UserError as error:
    assert "pip install 'dist-vpt[tfds]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_version_is_noted(own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy("tfrecord", "oxford_iiit_pet")
    assert opened("oxford_iiit_pet", root).notes == ("oxford_iiit_pet has version 4.0.0; published numbers used 3.2.0",)
    shutil.copytree(root / "oxford_iiit_pet" / "4.0.0", root / "oxford_iiit_pet" / "3.2.0")
    assert opened("oxford_iiit_pet", root).notes == ()


def refused(task: str, root: Path, message: str, **settings: Any) -> None:
    with pytest.raises(DataError) as caught:
        opened(task, root, **settings)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_other_counts_than_the_published_are_refused(copies: dict[str, Path]) -> None:
    message = (
        "split 'test' of task 'dtd': 60 images, and the published one has 1,880; complete .* data.check_counts=false"
    )
    refused("dtd", copies["tfrecord"], message, check_counts=True)


def test_what_is_not_prepared_is_reported(tmp_path: Path, copies: dict[str, Path]) -> None:
    refused(
        "dtd", tmp_path, r"no prepared dtd .*dist-vpt data prepare dtd --root .*nor is there a vtab-1k folder \(dtd/"
    )
    refused("dtd", tmp_path, "no prepared dtd", format="tfds")
    (tmp_path / "dtd" / "3.0.1").mkdir(parents=True)  # of a preparation that was broken off
    refused("dtd", tmp_path, "no prepared dtd", format="tfds")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_gone(kind: str, own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy(kind, "dtd")
    next(root.glob(f"dtd/*/*test*{kind}*")).unlink()
    refused("dtd", root, "dtd-test.*: does not exist, though dataset_info.json lists it; copy the dataset again")


def test_damaged_metadata(own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy("tfrecord", "dtd")
    file = next(root.glob("dtd/*/dataset_info.json"))
    file.write_text(file.read_text()[:-40])
    refused("dtd", root, f"{re.escape(str(file.parent))}: not a prepared dataset .*; copy it again, or prepare")


def test_a_split_that_is_missing(own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy("tfrecord", "clevr")
    file = next(root.glob("clevr/*/dataset_info.json"))
    file.write_text(file.read_text().replace('"validation"', '"valid"'))
    refused("clevr_count", root, "has no split 'validation', of which test is a part; prepare the dataset again")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_records_are_named(kind: str, own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy(kind, "svhn_cropped")
    file = next(root.glob(f"svhn_cropped/*/*test*{kind}*"))
    whole = file.read_bytes()
    for place in range(300, 700, 100):  # in an image, or in what is around it
        file.write_bytes(whole[:place] + bytes(255 - value for value in whole[place : place + 4]) + whole[place + 4 :])
        with pytest.raises(DataError) as caught:
            opened("svhn", root)["test"].labels  # noqa: B018 (which reads them)
        first = str(caught.value).splitlines()[0]
        assert re.fullmatch(
            rf".*{re.escape(file.name)} record \d+( of 60)?: damaged \(.*; copy the file again, or .*", first
        )
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{re.escape(file.name)}.*copy the file again, or prepare the dataset again"):
        opened("svhn", root)["test"].labels  # noqa: B018


def test_labels_out_of_range_are_named(copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tfds.LABELS, "clevr_count", lambda features: 8)
    with pytest.raises(
        DataError, match=r"record 0: label 8 is out of range: clevr_count has 8 classes.*\n(.*\n)+.*\d more"
    ):
        opened("clevr_count", copies["tfrecord"]).train.labels  # noqa: B018


def test_a_damaged_picture_is_named_or_skipped(copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tfds.TfdsSource.features

    def half(self: tfds.TfdsSource, i: int) -> Any:
        found = whole(self, i)
        if i != 3:
            return found
        encoded = found["image"].bytes_list.value[0]
        return {**found, "image": feature(bytes_list=[encoded[: len(encoded) // 2]])}

    monkeypatch.setattr(tfds.TfdsSource, "features", half)
    for task in ("caltech101", "eurosat"):  # JPEG, PNG
        test = opened(task, copies["tfrecord"])["test"]
        with pytest.raises(DataError, match=r"record \d+: the image cannot be read"):
            test.read(3)
        batches = EvalBatches(test, ImageTransform(16, "vpt"), 50, on_decode_error="skip")
        assert sum(float(batch["weight"].sum()) for batch in batches) == len(test) - 1
        assert len(batches.skipped) == 1


def test_a_large_picture_is_refused(copies: dict[str, Path]) -> None:
    for task in ("caltech101", "eurosat"):
        with pytest.raises(DataError, match=r"record .* megapixels; at most 0\.0001 are decoded"):
            opened(task, copies["tfrecord"])["test"].read(0, 1e-4)


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch, copies: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(
        UserError, match=r"packages that are not installed \(.*simplejpeg.*pip install 'dist-vpt\[tfds\]'"
    ):
        opened("dtd", copies["tfrecord"])


def test_a_jpeg_with_bytes_too_many_is_read_and_one_cut_off_is_not(copies: dict[str, Path]) -> None:
    encoded = opened("caltech101", copies["tfrecord"])["test"].source.features(0)["image"].bytes_list.value[0]  # type: ignore[attr-defined]
    longer = encoded[:-2] + bytes(198) + encoded[-2:]
    assert np.array_equal(tfds._jpeg(longer, "here", 1.0), tfds._jpeg(encoded, "here", 1.0))
    with pytest.raises(DataError, match="here: the image cannot be read"):
        tfds._jpeg(encoded[: len(encoded) // 2], "here", 1.0)


def test_leftovers_beside_a_version_are_no_version(own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy("tfrecord", "dtd")
    for leftover in ("3.0.1.old", "9.9.9.incompleteABC"):
        shutil.copytree(root / "dtd" / "3.0.1", root / "dtd" / leftover)
    assert opened("dtd", root).storage == "tfds dtd:3.0.1 (tfrecord)"


def test_two_storages_in_one_place_are_noted(own_copy: Callable[[str, str], Path]) -> None:
    root = own_copy("tfrecord", "dtd")
    (root / "dtd" / "train800.txt").write_text("")
    assert opened("dtd", root).notes == (f"{root / 'dtd'} exists too; data.format=vtab_folder uses it",)
    assert opened("dtd", root, format="tfds").notes == ()

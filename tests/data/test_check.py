"""`dist-vpt data check` and `prepare`: what they find, what they report, and how they end."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds_library
from PIL import Image

from dist_vpt.cli.main import main
from dist_vpt.data import check as module
from dist_vpt.data import prepare as prepare_module
from dist_vpt.data.check import CheckedTask, check, histogram
from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.prepare import prepare
from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import DataError, UserError
from tests.data import tfds_copies


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tfds_copies.prepare(tmp_path_factory.mktemp("copies"), ("dtd", "oxford_iiit_pet", "dsprites"))


def folder(root: Path, name: str, counts: dict[str, int], classes: int) -> Path:
    """A vtab-1k folder whose lists name one picture again and again."""
    home = root / name
    (home / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(home / "images" / "a.jpg")
    for file, count in counts.items():
        (home / file).write_text("".join(f"images/a.jpg {i % classes}\n" for i in range(count)))
    return home


WHOLE = {"train800.txt": 800, "val200.txt": 200, "train800val200.txt": 1000, "test.txt": 711}


def found(root: Path, *tasks: str) -> dict[str, CheckedTask]:
    """What is found, whether it is as published or not."""
    kept: dict[str, CheckedTask] = {}
    original = module.show
    module.show = lambda root, checked: kept.update({one.task: one for one in checked})  # type: ignore[assignment]
    try:
        check(str(root), tasks)
    except DataError:
        pass
    finally:
        module.show = original
    return kept


def test_a_folder_as_published_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "kitti", WHOLE, 4)
    assert main(["data", "check", "--root", str(tmp_path)]) == 0
    one = found(tmp_path)["kitti"]
    assert (one.storage, one.wrong, one.notes) == ("vtab_folder", [], [])
    assert {name: counts.tolist() for name, counts in one.splits.items()} == {
        "train": [200] * 4, "val": [50] * 4, "trainval": [250] * 4, "test": [178, 178, 178, 177],
    }  # fmt: skip
    assert one.sample == "20x10"
    table = capsys.readouterr().out
    assert "kitti" in table
    assert "800/200/711" in table
    assert "not found: cifar100, caltech101, dtd" in table


@pytest.mark.parametrize("name", ["cifar", "cifar100", "CIFAR"])
def test_folders_are_found_under_every_name_in_circulation(name: str, tmp_path: Path) -> None:
    folder(tmp_path, name, {**WHOLE, "test.txt": 10000}, 100)
    assert found(tmp_path, "cifar100")["cifar100"].wrong == []
    assert len(open_splits(DataConfig(task="cifar100", root=str(tmp_path / name))).train) == 800


def test_what_differs_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--root", str(root)]) == 2
    printed = capsys.readouterr()
    assert "dtd: split test has 60 images, the published one 1,880" in printed.out
    assert "4 of 24 tasks are not as published: dtd, oxford_iiit_pet, dsprites_loc, dsprites_ori" in printed.err
    one = found(root)["oxford_iiit_pet"]
    assert one.storage == "tfds oxford_iiit_pet:4.0.0 (array_record)"
    assert one.notes == ["oxford_iiit_pet has version 4.0.0; published numbers used 3.2.0"]
    assert found(root)["dsprites_loc"].sample == "64x64"


def test_a_task_that_was_named_must_be_there(tmp_path: Path) -> None:
    folder(tmp_path, "kitti", WHOLE, 4)
    with pytest.raises(DataError, match="1 of 2 tasks are not as published: dtd"):
        check(str(tmp_path), ["kitti", "dtd"])
    with pytest.raises(UserError, match="kiti: no such task; did you mean 'kitti'"):
        check(str(tmp_path), ["kiti"])


def test_tasks_of_the_package_need_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "shapes_ori", "digits"]) == 0
    table = capsys.readouterr().out
    assert ("800/200/1000" in table, "1000/200/597" in table, "not found" in table) == (True, True, False)
    for words in (["shapes_ori", "dtd"], [], ["--storage", "image_folder"]):
        assert main(["data", "check", *words]) == 2
        assert "error: --root DIR is missing: the folder" in capsys.readouterr().err


def test_nothing_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the known tasks; use the folder with the datasets"):
        check(str(tmp_path), [])
    with pytest.raises(DataError, match=r"--root .*/no: is not a folder"):
        check(str(tmp_path / "no"), [])


def test_damage_is_reported_and_the_others_are_checked(tmp_path: Path) -> None:
    home = folder(tmp_path, "kitti", {**WHOLE, "val200.txt": 199}, 4)
    (home / "test.txt").write_text("images/a.jpg 4\nimages/b.jpg 0\n")
    folder(tmp_path, "svhn", {**WHOLE, "test.txt": 26032}, 10)
    checked = found(tmp_path)
    assert [line.split(": ", 1)[1] for line in checked["kitti"].wrong] == [
        "label 4 is out of range: 4 classes have the labels 0 to 3; fix the label, or complete classes.txt",
        f"there is no file 'images/b.jpg' in {home} or {home / 'images'}; restore it or remove its entry",
    ]
    assert checked["svhn"].wrong == []
    (home / "test.txt").write_text("images/a.jpg 0\n")
    (home / "images" / "a.jpg").write_bytes(b"no picture")
    wrong = found(tmp_path)["kitti"].wrong
    assert any("the image cannot be read" in line for line in wrong)
    assert "split val has 199 images, the published one 200" in wrong
    assert "split test has 1 images, the published one 711" in wrong


def test_fgvc_sets_are_found(tmp_path: Path) -> None:
    home = tmp_path / "CUB_200_2011"
    (home / "images").mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(home / "images" / "a.jpg")
    for i in range(400):
        shutil.copy(home / "images" / "a.jpg", home / "images" / f"{i}.jpg")
    (home / "train.json").write_text(json.dumps({f"{i}.jpg": i % 200 + 1 for i in range(400)}))
    (home / "test.json").write_text(json.dumps({"a.jpg": 1}))
    one = found(tmp_path, "cub")["cub"]
    assert one.storage == "fgvc_json"
    assert one.wrong == ["split test has 1 images, the published one 5,794"]
    assert one.notes == ["has no val, which is split off train by data.split_seed"]
    assert one.splits["trainval"].tolist() == [2] * 200


def test_histograms() -> None:
    assert histogram(np.array([0, 1, 4, 8])) == " ▁▄█"
    assert histogram(np.array([], np.int64)) == ""
    assert histogram(np.zeros(5, np.int64)) == ""
    assert histogram(np.repeat([1, 0], 12)) == "██████      "  # 24 classes in twelve buckets


def test_prepare_fetches_and_reads_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the downloads replaced; all else is TFDS's own."""
    original = tfds_library.builder

    def builder(name: str, **settings: Any) -> Any:
        made = original(name, **settings)
        pictures = tfds_copies._pictures(name, made.info.features)
        made._split_generators = lambda _: {
            split: tfds_copies._examples(name, split, count, made.info.features, pictures)
            for split, count in tfds_copies.SIZES[name].items()
        }
        return made

    monkeypatch.setattr(tfds_library, "builder", builder)
    monkeypatch.setattr(prepare_module, "_has_tensorflow", lambda: True)
    assert main(["data", "prepare", "dtd", "dsprites_loc", "dsprites_ori", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("preparing in") == 2  # a builder serves two tasks
    for task in ("dtd", "dsprites_ori"):
        splits = open_splits(DataConfig(task=task, root=str(tmp_path), check_counts=False))
        assert len(splits.train.labels) == 800
    assert main(["data", "prepare", "dtd", "--root", str(tmp_path)]) == 0
    assert "dtd: already prepared" in capsys.readouterr().out


def test_the_published_version_is_prepared_where_the_library_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}

    def prepared(self: Any, **_: Any) -> None:
        made[self.name] = (str(self.version), [str(version) for version in self.versions])

    monkeypatch.setattr(prepare_module, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds_library.core.DatasetBuilder, "download_and_prepare", prepared)
    prepare(str(tmp_path), ["dtd", "kitti", "oxford_iiit_pet"])
    assert made["dtd"][0].startswith("3.")
    for name in ("kitti", "oxford_iiit_pet"):
        version, makes = made[name]
        assert version == ("3.2.0" if "3.2.0" in makes else makes[0])


def test_what_cannot_be_prepared_is_reported_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, **_: Any) -> None:
        if "retinopathy" in self.name:
            raise AssertionError("Manual directory does not exist")
        raise ConnectionError("no network") if self.name == "dtd" else OSError("disk full")

    with pytest.raises(
        UserError, match=r"preparing needs TensorFlow, training does not: pip install 'dist-vpt\[prepare\]'"
    ):
        prepare(str(tmp_path), ["dtd"])  # before anything is fetched
    monkeypatch.setattr(prepare_module, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds_library.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path), ["dtd", "diabetic_retinopathy", "svhn"])
    dtd, retinopathy, svhn = str(caught.value).splitlines()
    assert dtd == "dtd: ConnectionError: no network; see the message and run the command again"
    assert "must be downloaded by hand" in retinopathy
    assert "kaggle" in retinopathy.lower()
    assert str(tmp_path / "downloads" / "manual") in retinopathy
    assert svhn == "svhn_cropped: OSError: disk full; see the message and run the command again"
    with pytest.raises(UserError, match="cub: TensorFlow Datasets does not have it"):
        prepare(str(tmp_path), ["cub"])


def test_every_row_has_a_folder_name() -> None:
    for row in TASKS.values():
        assert (row.group is None) or row.folders

"""`dist-vpt data check --storage`: tables of one's own dataset, and what would spoil its scores."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from dist_vpt.cli.main import main


def checked(folders: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["data", "check", "--root", str(folders), "--storage", "image_folder", *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row(out: str, name: str) -> list[str]:
    [line] = [line for line in out.splitlines() if line.split()[:1] == [name]]
    return line.split()


def test_a_sound_dataset(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = checked(folders, capsys)
    assert (code, err) == (0, "")
    assert row(out, "train") == ["train", "12", "0", "10", "to", "10,", "half", "below", "10", "RGB", "12"]
    assert row(out, "dog") == ["dog", "6", "6", "6"]


def test_everything_that_is_wrong_is_listed_with_its_files(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "train/cat/0.png").write_bytes(b"no image")
    shutil.copy(folders / "train/cat/1.png", folders / "test/cat/leak.png")
    shutil.copy(folders / "train/cat/2.png", folders / "train/dog/other.png")
    shutil.copy(folders / "val/cat/2.png", folders / "val/cat/twice.png")
    Image.new("RGBA", (30, 20)).save(folders / "val/dog/clear.png")
    for i in range(3):
        (folders / f"train/dog/{i}.png").unlink()
    code, out, err = checked(folders, capsys)
    assert code == 2
    assert "3 kinds of mistakes, listed above" in err
    assert "Traceback" not in err
    for title, file in (
        ("1 images cannot be read:", "train/cat/0.png: the image cannot be read"),
        ("1 images are in two splits, byte for byte:", f"{folders}/train/cat/1.png = {folders}/test/cat/leak.png"),
        ("1 images are in two classes, byte for byte:", f"{folders}/train/cat/2.png = {folders}/train/dog/other.png"),
        ("1 images are there more than once:", f"{folders}/val/cat/2.png = {folders}/val/cat/twice.png"),
        ("1 classes have fewer than 5 images in train:", "dog (4)"),
    ):
        lines = out.splitlines()
        assert file in lines[lines.index(title) + 1]
    assert row(out, "train")[2] == "1"
    assert row(out, "val")[-4:] == ["RGB", "13,", "RGBA", "1"]


def test_own_data_without_the_option_and_known_tasks_with_it(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--root", str(folders)]) == 2
    assert "for your own data add --storage image_folder" in capsys.readouterr().err
    assert checked(folders, capsys, "dtd")[0] == 2


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = checked(tmp_path / "nix", capsys)
    assert (code, out) == (2, "")
    assert "is not a folder" in err


def test_a_table_with_keys(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{split}/{name}/{i}.png,{name},{split}"
        for split in ("train", "test")
        for name in ("cat", "dog")
        for i in range(6)
    ]
    (folders / "labels.csv").write_text("\n".join(["where,kind,split", *rows]))
    argv = ["data", "check", "--root", str(folders / "labels.csv"), "--storage", "table"]
    assert main([*argv, "data.table.label=kind"]) == 2
    assert (
        "none of its columns 'where', 'kind', 'split' has a usual name of the images' paths" in capsys.readouterr().err
    )
    assert main([*argv, "data.table.image=where", "data.table.label=kind", "data.val_fraction=0.25"]) == 0
    assert "split off train by a seed: val" in capsys.readouterr().out
    assert main([*argv, "dtd"]) == 2
    assert "dtd: --storage is for your own data, which is no known task; leave one out, or" in capsys.readouterr().err
    assert main([*argv, "data.table.lable=kind"]) == 2
    assert "data.table.lable = 'kind': unknown key; did you mean 'label'?" in capsys.readouterr().err

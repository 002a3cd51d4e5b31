"""16-bit gray images that hold fewer bits are named, and nothing is scaled."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.check_own import check_own
from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.data.depth import depth_warning
from dist_vpt.data.formats import open_splits
from dist_vpt.data.splits import Split
from tests.running import train


def gray(root: Path, largest: int, extension: str = ".png") -> Split:
    """Class folders of 16-bit images, of which the last one of train holds ``largest``."""
    for split in ("train", "val", "test"):
        for k, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                pixels_HW = np.full((9, 8), largest // 2 + 8 * k + i, np.uint16)
                pixels_HW[0, 0] = largest if (k, i) == (1, 5) else 0
                Image.fromarray(pixels_HW).save(root / split / name / f"{i}{extension}")
    config = DataConfig(task="mine", format="image_folder", root=str(root))
    return open_splits(config, resolve(config)).train


@pytest.mark.parametrize("extension", [".png", ".tif"])
@pytest.mark.parametrize(("largest", "bits", "times"), [(1000, 10, 64), (4095, 12, 16), (16383, 14, 4)])
def test_few_bits_are_named(tmp_path: Path, largest: int, bits: int, times: int, extension: str) -> None:
    warning = depth_warning(gray(tmp_path, largest, extension))
    assert warning.startswith(
        f"{tmp_path}/train/dog/5{extension}: {largest:,} is the largest value in 12 16-bit images of train "
    )
    assert warning.endswith(f"if they hold {bits}-bit values, multiply them by {times}, or save them with 8 bits")


def test_one_bright_image_tells_that_all_bits_are_used(tmp_path: Path) -> None:
    assert not depth_warning(gray(tmp_path, 16384))


def test_8_bit_and_unreadable_images_are_passed_over(folders: Path) -> None:
    (folders / "train/cat/0.png").write_bytes(b"x")
    config = DataConfig(task="mine", format="image_folder", root=str(folders))
    assert not depth_warning(open_splits(config, resolve(config)).train)
    resolved = DataConfig()
    assert not depth_warning(open_splits(resolved, resolve(resolved)).train)  # digits, which are no files


def test_a_run_and_the_check_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gray(tmp_path / "data", 4095)
    own = ("data.task=mine", "data.format=image_folder", f"data.root={tmp_path / 'data'}", "train.batch_size=6")
    train(tmp_path / "run", *own, "data.check_leaks=false")
    assert (tmp_path / "run/train.log").read_text().count("read at 6.2 % of full brightness; if they hold 12-bit") == 1
    capsys.readouterr()
    with pytest.raises(ValueError, match="kinds of mistakes"):  # files of two splits are equal
        check_own(DataConfig(task="mine", format="image_folder", root=str(tmp_path / "data")))
    assert capsys.readouterr().out.count("if they hold 12-bit values, multiply them by 16") == 3

"""`dist-vpt backbones check`: what it prints of a file, and its exit code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.backbones.build import create
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import main
from tests.backbones.published import FILES, File, file

__all__ = ["file"]  # a fixture


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row costs a model, if one without memory."""
    for name in ZOO.keys() - {"sup_b16_in1k", "swin_t_in1k", "mocov3_b16", "mae_b16"}:
        monkeypatch.delitem(ZOO, name)


def checked(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Exit code, what was printed line by line, and the error."""
    code = main(["backbones", "check", str(path)])
    out, err = capsys.readouterr()
    lines = (re.split(r"\s{2,}|(?<=strictly) ", line.strip(), maxsplit=1) for line in out.splitlines()[1:])
    return code, dict(lines), err


def test_every_published_file_fits_its_short_name(
    few_rows: None, file: File, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines, err = checked(file.save(tmp_path), capsys)
    assert (code, err) == (0, "")
    assert "tiny" in lines["fits"]
    assert lines["loads strictly"].startswith("yes: backbone.name=")
    assert lines["model"].startswith(file.row.architecture)
    assert ("left out" in lines) == bool(file.left_out)
    shapes = "patches of 4, depth 1+2, width 16" if file.row.layout == "swin" else "depth 2, width 16"
    assert lines["shapes"].endswith(shapes)
    if file.row.layout not in ("swin", "dinov3"):  # which have no table of positions
        assert f"images of {file.row.size} px" in lines["shapes"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_a_damaged_file_is_refused_by_the_tensors_name(
    few_rows: None, file: File, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = file.arrays()
    prefix = "module.base_encoder." if file.layout == "mocov3" else "module." if file.layout == "mocov3_linear" else ""
    end = {"jax": "Transformer/encoder_norm/bias", "clip": "visual.ln_post.bias"}.get(file.layout, "norm.bias")
    name = next(n for n in arrays if n in (prefix + end, "fc_norm.bias"))
    if change == "missing":
        del arrays[name]
    elif change == "unexpected":
        name = "visual.thing" if file.layout == "clip" else "thing"
        arrays[name] = arrays.copy().popitem()[1]
    else:
        arrays[name] = arrays[name][:-1]
    code, lines, err = checked(file.save(tmp_path, arrays), capsys)
    assert code == 2
    assert "fits" not in lines
    assert "does not load strictly; as " in err
    assert re.search(rf"1 {change}.*: {re.escape(name.removeprefix('module.'))}(:|\n)", err)


def test_a_number_that_is_none_does_not_load(
    few_rows: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "tiny", FILES["in1k"].row)
    arrays = FILES["in1k"].arrays()
    arrays["norm.weight"][0] = float("nan")
    code, lines, err = checked(FILES["in1k"].save(tmp_path, arrays), capsys)
    assert (code, lines) == (2, {})
    assert "norm.weight holds 1 values that are not finite" in err


def whole(architecture: str, **options: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model in full size and without memory: one number each, which the file holds once."""
    with torch.device("meta"):
        state = create(architecture, 224, **options).state_dict()
    return {name: torch.ones(1).expand(tensor.shape) for name, tensor in state.items()}


def test_a_file_in_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"module.base_encoder.{n}": t for n, t in whole("vit_base_patch16_224").items()}
    state["module.predictor.0.weight"] = torch.zeros(1)
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    code, lines, _ = checked(tmp_path / "a.pth.tar", capsys)
    assert code == 0
    assert lines == {
        "layout": "MoCo v3 with both encoders, PyTorch",
        "shapes": "85,798,657 numbers in 151 tensors, images of 224 px, patches of 16, depth 12, width 768",
        "left out": "predictor",
        "model": "vit_base_patch16_224, 12 heads in its first block",
        "fits": "mocov3_b16",
        "loads strictly": f"yes: backbone.name=mocov3_b16 backbone.weights={tmp_path / 'a.pth.tar'}",
    }


def test_several_short_names_may_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": whole("vit_base_patch16_224", num_classes=1000)}, tmp_path / "a.pth")
    _, lines, _ = checked(tmp_path / "a.pth", capsys)
    fits, rest = lines["fits"].split(" (")
    assert fits.split(", ")[:2] == ["sup_b16_in1k", "dino_b16"]  # published like this
    assert {"sup_b16_in21k", "augreg_b16_in1k"} < set(fits.split(", "))  # may have been saved like this
    assert {ZOO[name].size for name in fits.split(", ")} == {224}
    assert rest.startswith("shapes alone cannot tell")


def test_a_model_without_a_short_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(whole("vit_small_patch32_224", depth=3), tmp_path / "a.pth")
    code, lines, err = checked(tmp_path / "a.pth", capsys)
    assert code == 2
    assert lines["shapes"].endswith("images of 224 px, patches of 32, depth 3, width 384")
    assert "fits none of the short names of this layout; if it holds another VisionTransformer" in err


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "a.pth")
    code, lines, err = checked(tmp_path / "a.pth", capsys)
    assert (code, lines) == (2, {})
    assert "a.pth: holds a ResNet (a convolutional network)" in err
    code, _, err = checked(tmp_path / "none.pth", capsys)
    assert code == 2
    assert "no such weights file" in err

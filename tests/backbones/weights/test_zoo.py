"""The table of published weights: its facts are timm's where timm has them, and every row can be built."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from dist_vpt.backbones import build as module
from dist_vpt.backbones.build import build, create, preprocessing_of
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.weights.convert import heads_of
from dist_vpt.backbones.weights.layouts import LAYOUTS
from dist_vpt.backbones.weights.zoo import CLIP, HALF, IMAGENET, ZOO
from dist_vpt.cli.main import main
from dist_vpt.errors import WeightsError
from tests.backbones.published import FILES


def test_short_names_are_not_timms() -> None:
    assert not [name for name in ZOO if timm.is_model(name) or name == "demo"]
    assert all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)+", name) for name in ZOO)


@pytest.mark.parametrize("name", [name for name, row in ZOO.items() if row.pretrained])
def test_facts_are_timms(name: str) -> None:
    row = ZOO[name]
    cfg = timm.get_pretrained_cfg(row.pretrained)
    assert cfg is not None
    assert cfg.has_weights
    assert (cfg.input_size, cfg.interpolation) == ((3, row.size, row.size), row.interpolation)
    assert (tuple(cfg.mean), tuple(cfg.std)) == row.channels[1:]
    if row.layout != "clip":  # timm gives OpenAI's weights its own license
        assert cfg.license == row.project.license.lower()


@pytest.mark.parametrize("name", ZOO)
def test_every_row_is_a_model_that_can_be_tuned(name: str) -> None:
    row = ZOO[name]
    with torch.device("meta"):
        model = create(row.architecture, row.size, **row.options)
    assert LAYOUTS[row.layout].family == ("swin" if hasattr(model, "layers") else "vit")
    # Pre-trained MAE's class token was trained for nothing: VPT's tables read the mean of its patches. DINOv3's is what
    # it was trained by, though timm's default is the mean.
    assert row.pool == {"mae": "avg", "dinov3": "token"}.get(row.layout, model.global_pool)
    assert row.channels in (HALF, IMAGENET, CLIP)
    assert row.project.page.startswith("github.com/")
    assert row.trained
    width, depth, heads = _published_shape(name)
    blocks = [len(stage.blocks) for stage in model.layers] if hasattr(model, "layers") else len(model.blocks)
    assert (model.num_features, blocks, heads_of(model)) == (width, depth, heads)


def _published_shape(name: str) -> tuple[int, Any, int]:
    """Width, depth and heads (Swin: of the first stage) as the papers have them."""
    if name.startswith("swin"):
        return {
            "t": (768, [2, 2, 6, 2], 3), "s": (768, [2, 2, 18, 2], 3), "b": (1024, [2, 2, 18, 2], 4),
            "l": (1536, [2, 2, 18, 2], 6),
        }[name.split("_")[1][0]]  # fmt: skip
    kind = re.sub(r"\d+$", "", name.split("_")[1])
    if name == "mocov3_s16":
        return 384, 12, 12
    if name == "dinov3_h16":
        return 1280, 32, 20
    return {
        "ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16),
        "g": (1536, 40, 24), "so": (1152, 27, 16),
    }[kind]  # fmt: skip


def test_a_short_name_has_its_preprocessing() -> None:
    moco, jax = (preprocessing_of(BackboneConfig(name=name)) for name in ("mocov3_b16", "sup_b16_ft384"))
    assert (moco.image_size, moco.mean, moco.std, moco.interpolation) == (224, *IMAGENET[1:], "bilinear")
    assert (jax.image_size, jax.mean, jax.std, jax.interpolation) == (384, *HALF[1:], "bicubic")


def test_pretrained_weights_of_a_short_name_are_timms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row, asked = FILES["mae"].row, []
    source = create(row.architecture, row.size, **row.options)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setitem(ZOO, "tiny", type(row)(**(vars(row) | {"tag": "mae"})))
    monkeypatch.setattr(module, "_from_hub", lambda name: asked.append(name) or tmp_path / "a.safetensors")
    backbone, _ = build(BackboneConfig(name="tiny"), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert asked == ["vit_base_patch16_224.mae"]
    assert torch.equal(backbone.norm.weight, source.norm.weight)


def test_weights_that_the_hub_lacks_are_fetched_from_the_project() -> None:
    with pytest.raises(
        WeightsError, match=r"download the file from github\.com/facebookresearch/moco-v3 and set backbone"
    ):
        build(BackboneConfig(name="mocov3_s16"), image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_the_table_fits_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in "".join(lines)
    above, facts = {}, []  # the two lines that head a row's section
    for line in lines:
        if line.startswith("github.com/"):
            facts = [line]
        elif len(facts) == 1:
            facts.append(line)
        elif line.split()[:1] and line.split()[0] in ZOO:
            above[line.split()[0]] = (*facts, line)
    assert list(above) == list(ZOO)
    for name, row in ZOO.items():
        project, wants, line = above[name]
        assert project == ", ".join(row.project)
        assert line.split()[1:4] == [row.architecture, str(row.size), row.pool]
        assert line.strip().endswith(row.trained)
        layout, channels, interpolation = wants.split("; ")
        assert (layout, interpolation) == (f"file layout {row.layout}", row.interpolation)
        assert channels.startswith(f"{row.channels.name}: mean ")
        shown = [float(number) for number in re.findall(r"\d\.\d+", channels)]
        assert shown == pytest.approx([*row.channels.mean, *row.channels.std], abs=1e-6)

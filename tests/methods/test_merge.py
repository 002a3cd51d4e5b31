"""Merged weights: what plain timm makes of them is what the method gave."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from dist_vpt.backbones.build import DEMO
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import main
from dist_vpt.errors import UserError
from dist_vpt.inference.load import load_run
from dist_vpt.inference.merge import timm_tensors
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs
from tests.backbones.published import FILES
from tests.backbones.test_swin import make as make_on_swin
from tests.backbones.test_swin import make_swin
from tests.evas import EVAS
from tests.methods.conftest import KINDS, MEAN, STD, config_of, make_backbone, make_vit
from tests.running import train

pytestmark = pytest.mark.usefixtures("on_the_cpu")
MERGED: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "full": {"name": "full"},
    "partial": {"name": "partial", "blocks": 2},
    "bias": {"name": "bias"},
    "cls": {"name": "cls"},
    "lora": {"name": "lora", "rank": 2, "targets": ("q", "k", "v", "proj", "fc1", "fc2"), "alpha": 1.0},
    "ssf": {"name": "ssf"},
}


def make(settings: dict[str, Any], kind: str = "class_token", **changes: Any) -> Method:
    method = attach(config_of(settings), make_backbone(kind, **changes), classes=4)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in method.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return method.eval()


# No token; a patch embedding without bias (pre-norm); keys without bias, or both.
NOT = {("cls", "no_class_token"), ("ssf", "mean_pooled"), *(("ssf", kind) for kind in EVAS)}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in MERGED for kind in KINDS if (name, kind) not in NOT]
)
def test_equal_outputs_of_plain_timm(name: str, kind: str, images: torch.Tensor) -> None:
    method, plain = make(MERGED[name], kind), make_vit(kind, num_classes=4)
    before = plain(normalized(images))
    plain.load_state_dict(timm_tensors(method), strict=True)
    after = plain(normalized(images))
    assert torch.allclose(after, method(images), atol=1e-4 * float(after.abs().max()))
    assert not torch.allclose(after, before, atol=0.1)


@pytest.mark.parametrize("name", ["linear", "full"])
def test_equal_outputs_of_plain_swin(name: str) -> None:
    """Whose modules stand elsewhere here than in timm's model."""
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    method, plain = make_on_swin(MERGED[name]), make_swin(num_classes=4)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(timm_tensors(method), strict=True)
    expected = method.eval()(images)
    assert torch.allclose(plain.eval()(normalized(images)), expected, atol=1e-4 * float(expected.abs().max()))


def normalized(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


@pytest.mark.parametrize(
    ("settings", "backbone", "message"),
    [
        ({"name": "vpt"}, {}, "VPT computes what no plain timm model does"),
        ({"name": "mlp"}, {}, "MLP computes what no plain timm model does"),
        ({"name": "adapter"}, {}, "Adapter computes what no plain timm model does"),
        ({"name": "ssf"}, {"qkv_bias": False}, r"blocks.0.attn.qkv has no bias"),
        ({"name": "ssf"}, {"kind": "mean_pooled"}, r"patch_embed.proj has no bias"),
        ({"name": "ssf"}, {"kind": "dinov3"}, r"blocks.0.attn.qkv has no bias"),
        ({"name": "ssf"}, {"kind": "eva02_normed"}, r"blocks.0.attn.k_proj has no bias"),
    ],
)
def test_what_cannot_be_merged_is_refused(settings: dict[str, Any], backbone: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timm_tensors(make(settings, **backbone))


def test_a_merged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained in bf16, merged into float32 weights; the file is also a backbone's."""
    run, out = tmp_path / "run", tmp_path / "merged.safetensors"
    train(run, "method.name=lora", "train.batch_size=500", "runtime.precision=bf16", "train.test=false")
    assert main(["merge", str(run), "--out", str(out)]) == 0
    assert "merged.safetensors: weights for\nmodel = timm.models.VisionTransformer(" in capsys.readouterr().out
    tensors, facts = read_adapters(out)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert (facts["backbone"], facts["image_size"], len(facts["classes"])) == ("demo", 8, 10)
    recipe = load_recipe([run / "recipe.yaml"], ["runtime.precision=fp32"])
    method, _ = build_method(recipe, resolve_inputs(recipe), 10)
    adapters = run / "adapters.safetensors"
    restore(method, read_adapters(adapters)[0], adapters)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    plain = VisionTransformer(**(demo_architecture() | {"img_size": 8, "num_classes": 10})).eval()
    plain.load_state_dict(tensors, strict=True)
    backbone = method.backbone
    expected = plain((images - backbone.mean) / backbone.std)
    assert torch.allclose(method.eval()(images), expected, atol=1e-4)
    again = load_recipe([run / "recipe.yaml"], ["method.name=linear", f"backbone.weights={out}"])
    _, difference = build_method(again, resolve_inputs(again), 10)
    assert not difference
    assert main(["merge", str(run), "--out", str(tmp_path / "merged.pth")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "method"), [("mae", "bias"), ("swin", "full"), ("mocov3", "lora")])
def test_the_printed_model_gives_what_the_run_gave(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the weights' short name: it stands for an architecture, its options, and a pooling that timm's has not."""
    monkeypatch.setitem(ZOO, "tiny", FILES[kind].row)
    run, out = tmp_path / "run", tmp_path / "merged.safetensors"
    overrides = [f"method.name={method}", "backbone.name=tiny", "backbone.weights=random", "data.image_size=32"]
    result = train(run, *overrides, "data.interpolation=bilinear", "train.batch_size=500", "train.eval_batch_size=500")
    assert main(["merge", str(run), "--out", str(out)]) == 0
    code = capsys.readouterr().out.split(f"{out}: weights for\n")[1]
    names: dict[str, Any] = {}
    exec(code, {"timm": timm}, names)
    tensors, facts = read_adapters(out)
    names["model"].load_state_dict(tensors, strict=True)
    protocol = result["protocol"]
    assert (facts["interpolation"], facts["crop_mode"]) == (protocol["resize"], protocol["fit"])
    assert facts["interpolation"] == "bilinear"
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    found = names["model"].eval()((images / 255 - mean) / std)
    opened = load_run(str(run), "last")
    assert torch.allclose(found, opened.method(images.to(opened.device)).cpu(), atol=1e-4 * float(found.abs().max()))


def demo_architecture() -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(DEMO, "pt") as file:
        return json.loads(file.metadata()["architecture"])

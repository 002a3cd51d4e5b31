"""Frozen weights in 8 bits: what they compute, what is held and kept, what is refused."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError, UserError
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.int8 import apply_int8
from tests.forks import command
from tests.methods.conftest import make_backbone
from tests.methods.test_against_reference import VARIANTS, recipe_of
from tests.methods.test_structure import loss_of
from tests.running import ROOT, step_losses, train, words
from tests.runtime.test_policies import IMAGES, saved

pytestmark = pytest.mark.usefixtures("on_the_cpu")
INT8 = "runtime.quantize=int8"


@pytest.fixture
def torchao() -> None:
    pytest.importorskip("torchao", reason="pip install 'dist-vpt[int8]'")


def make(variant: str, dtype: torch.dtype = torch.float32, **backbone: Any) -> Method:
    torch.manual_seed(0)
    method = attach(recipe_of(VARIANTS[variant]), make_backbone(**backbone), 5, dtype).train()
    with torch.no_grad():
        for name, parameter in method.trainable():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + name.endswith(".scale"))
    return method


def on_levels(method: Method) -> Method:
    """The weights of the blocks' linear layers where they are nearest: at 255 levels between +- their row's largest."""
    for module in method.backbone.blocks.modules():
        if isinstance(module, nn.Linear):
            weight_OD = module.weight.double().numpy()
            step_O1 = np.abs(weight_OD).max(axis=1, keepdims=True) / 127
            module.weight.copy_(torch.from_numpy(np.rint(weight_OD / step_O1) * step_O1))
    return method


def numbers(method: Method) -> dict[str, torch.Tensor]:
    loss = loss_of(method, IMAGES)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in method.trainable() if p.grad is not None}


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("policy", ["none", "mlp", "block", "budget-0.5"])
@pytest.mark.parametrize("variant", ["vpt deep", "bias", "lora of all", "houlsby", "ssf", "linear"])
def test_it_computes_with_the_nearest_levels(variant: str, policy: str) -> None:
    method = make(variant)
    apply_int8(method.backbone)
    apply_checkpointing(method.backbone, policy)
    with torch.no_grad():
        wanted = on_levels(make(variant))
    found, wanted_numbers = numbers(method), numbers(wanted)
    assert found.keys() == wanted_numbers.keys()
    for name, number in wanted_numbers.items():
        assert torch.allclose(found[name], number, atol=2e-5 * float(number.abs().max())), name


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("kind", ["dinov3", "dinov3_swiglu", "eva02", "eva02_normed", "perception"])
@pytest.mark.parametrize("variant", ["vpt deep", "bias", "lora of all", "houlsby", "ssf"])
def test_layers_of_eva_compute_with_the_nearest_levels(variant: str, kind: str) -> None:
    method = make(variant, kind=kind)
    apply_int8(method.backbone)
    assert {m.weight.dtype for m in method.backbone.blocks.modules() if isinstance(m, nn.Linear)} == {torch.int8}
    with torch.no_grad():
        wanted = on_levels(make(variant, kind=kind))
    found, wanted_numbers = numbers(method), numbers(wanted)
    for name, number in wanted_numbers.items():
        assert torch.allclose(found[name], number, atol=2e-5 * float(number.abs().max())), name


@pytest.mark.usefixtures("torchao")
def test_half_is_held_and_nothing_more_is_kept() -> None:
    held, kept = [], []
    for apply in (lambda backbone: None, apply_int8):
        method = make("vpt deep", torch.bfloat16, embed_dim=64)
        apply(method.backbone)
        blocks = method.backbone.blocks
        held.append(sum(t.nbytes for t in (*blocks.parameters(), *blocks.buffers())))
        kept.append(saved(method))
    assert 0.5 * held[0] < held[1] < 0.55 * held[0]
    assert kept[1] <= kept[0]


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
def test_a_run_on_one_process_and_two(
    data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*data, "optim.scale_lr=false", "optim.lr=0.08")
    result = train(tmp_path / "alone", *options, INT8)
    assert result["runtime"]["frozen weights"] == "int8"
    mib = result["frozen_weights_mib"]
    whole = train(tmp_path / "whole", *options)
    assert 0.25 * whole["frozen_weights_mib"]["held"] < mib["held"] < 0.3 * whole["frozen_weights_mib"]["held"]
    assert result["parameters"] == whole["parameters"]
    assert result["last"]["test"]["loss"] == pytest.approx(whole["last"]["test"]["loss"], rel=0.02)
    for name, strategy in (("ddp", "ddp"), ("zero3", str(ROOT / "launch" / "accelerate" / "zero3.json"))):
        forks = command(["train", *words(tmp_path / name, *options, INT8)], tmp_path / f"{name}.txt", strategy)
        assert forks.finish() == [0, 0], forks.output[-3000:]
        assert step_losses(tmp_path / name) == pytest.approx(step_losses(tmp_path / "alone"), abs=1e-4)
    assert main(["eval", str(tmp_path / "alone")]) == 0
    assert main(["merge", str(tmp_path / "alone"), "--out", str(tmp_path / "merged.safetensors")]) == 2
    assert "runtime.quantize = int8: " in capsys.readouterr().err
    assert not (tmp_path / "merged.safetensors").exists()


@pytest.mark.usefixtures("torchao")
def test_blocks_that_read_weights_themselves_are_refused() -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(
        UserError, match=r"int8: only for timm's pre-norm ViT, EVA and Swin blocks; set runtime.quantize"
    ):
        apply_int8(make_backbone(block_fn=ParallelScalingBlock))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=re.escape("int8: torchao is not installed")) as caught:
        apply_int8(make_backbone())
    assert "pip install 'dist-vpt[int8]', or set runtime.quantize=none" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "does"),
    [("full", "trains the blocks'"), ("partial", "trains the blocks'"), ("vqt", "reads the blocks'")],
)
def test_methods_that_need_the_numbers(method: str, does: str) -> None:
    with pytest.raises(RecipeError, match=f"quantize = int8: method.name = {method} {does} weights"):
        load_recipe([], [f"method.name={method}", INT8])

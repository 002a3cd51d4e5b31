"""DINOv3 as a backbone: against slow float64 mathematics, with prompts and with everything that runs on a backbone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dist_vpt.backbones.build import build
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.eva import EvaBackbone
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import main
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.planning.footprint import footprint
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.attention import apply_attention
from tests.backbones.published import FILES, VIT, Arrays
from tests.methods.conftest import assert_equal_steps, config_of
from tests.reference import rotary as reference

MEAN, STD = (0.45, 0.5, 0.4), (0.2, 0.25, 0.3)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}  # DINOv3's angles are float32 in timm, whatever the weights are
LABELS = torch.tensor([0, 2, 1])
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "full": {"name": "full"},
    "vpt": {"name": "vpt", "prompts": 3},
    "vpt shallow": {"name": "vpt", "prompts": 2, "deep": False},
    "vqt": {"name": "vqt", "queries": 2},
    "lora": {"name": "lora", "rank": 2},
    "adapter": {"name": "adapter", "bottleneck": 3, "style": "houlsby"},
    "adaptformer": {"name": "adaptformer", "bottleneck": 3},
    "ssf": {"name": "ssf"},
    "bias": {"name": "bias"},
    "partial": {"name": "partial"},
}


@pytest.fixture
def arrays() -> Arrays:
    return FILES["dinov3"].arrays()


@pytest.fixture
def make(arrays: Arrays, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes methods on the tiny DINOv3 of the published names."""
    monkeypatch.setitem(ZOO, "tiny", FILES["dinov3"].row)
    path = str(FILES["dinov3"].save(tmp_path, arrays))

    def make_method(settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Method:
        backbone, _ = build(BackboneConfig(name="tiny", weights=path), image_size=32, mean=MEAN, std=STD)
        assert isinstance(backbone, EvaBackbone)
        torch.manual_seed(3)
        method = attach(config_of(settings), backbone, 4, dtype)
        for name, parameter in method.named_parameters():
            if name == "prompts":
                torch.nn.init.normal_(parameter)
        if dtype == torch.float64:
            method.double()
            for name, values in (("mean", MEAN), ("std", STD)):
                setattr(method.backbone, name, torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) * 255)
        return method

    return make_method


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(arrays: Arrays, images: Tensor, prompts: Any = ()) -> np.ndarray:
    return reference.features(arrays, images.numpy(), heads=2, mean=MEAN, std=STD, prompts=prompts)


def loss_of(method: Method, images: Tensor) -> Tensor:
    return F.cross_entropy(method(images), LABELS)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["linear", "vpt"])
def test_logits_are_the_references(name: str, dtype: torch.dtype, make: Any, arrays: Arrays, images: Tensor) -> None:
    method = make(SETTINGS[name], dtype)
    prompts = method.prompts.detach().double().numpy() if name == "vpt" else ()
    weight_KD, bias_K = (p.detach().double().numpy() for p in (method.head.weight, method.head.bias))
    wanted_BK = expected(arrays, images, prompts) @ weight_KD.T + bias_K
    for kernel in ("eager", "sdpa"):
        apply_attention(method.backbone, kernel, torch.float32, writes=False, cpu=True)
        found_BK = method.eval()(images).detach().double().numpy()
        assert np.abs(found_BK - wanted_BK).max() < TOLERANCE[dtype] * np.abs(wanted_BK).max(), kernel


def test_gradients_of_prompts_are_the_references(make: Any, arrays: Arrays, images: Tensor) -> None:
    method = make(SETTINGS["vpt"], torch.float64).train()
    loss_of(method, images).backward()
    weight_KD, bias_K = (p.detach().numpy() for p in (method.head.weight, method.head.bias))
    prompts_LPD, random = method.prompts.detach().numpy(), np.random.default_rng(2)

    def loss(prompts: np.ndarray) -> float:
        logits_BK = expected(arrays, images, prompts) @ weight_KD.T + bias_K
        logits_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
        chosen_B = logits_BK[np.arange(3), LABELS.numpy()]
        return float(np.mean(np.log(np.exp(logits_BK).sum(axis=1)) - chosen_B))

    for _ in range(4):
        direction, step = random.normal(size=prompts_LPD.shape), 1e-5
        slope = (loss(prompts_LPD + step * direction) - loss(prompts_LPD - step * direction)) / (2 * step)
        found = float((method.prompts.grad.numpy() * direction).sum())
        assert abs(found - slope) < 1e-6 * np.linalg.norm(method.prompts.grad) * np.linalg.norm(direction)


@pytest.mark.parametrize("name", SETTINGS)
def test_checkpointing_changes_nothing(name: str, make: Any, images: Tensor) -> None:
    plain, checkpointed = make(SETTINGS[name]), make(SETTINGS[name])
    apply_checkpointing(checkpointed.backbone, "block")
    assert_equal_steps(plain, checkpointed, lambda method: loss_of(method, images))


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_is_near(name: str, make: Any, images: Tensor) -> None:
    exact, half = make(SETTINGS[name]).eval()(images), make(SETTINGS[name], torch.bfloat16).eval()(images)
    assert half.dtype == torch.float32
    assert (exact - half).norm() < 0.03 * exact.norm()


def test_biases_of_keys_are_held_like_the_weights() -> None:
    recipe = BackboneConfig(name="vit_small_patch16_dinov3_qkvb", weights="random")
    backbone, _ = build(recipe, image_size=32, mean=MEAN, std=STD)
    backbone.hold_in(torch.bfloat16)
    assert backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).dtype == torch.bfloat16


def test_a_plan_counts_the_swiglu_of_the_larger_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, for a width of 16, two blocks, four registers and a SwiGLU of width 64 inside."""
    row = replace(FILES["dinov3"].row, architecture="vit_huge_plus_patch16_dinov3", options=VIT | {"mlp_ratio": 4})
    monkeypatch.setitem(ZOO, "tiny", row)
    words = ["backbone.name=tiny", "backbone.weights=random", "data.task=digits", "data.image_size=32"]
    counted = footprint(load_recipe([], [*words, "method.name=linear", "train.batch_size=4"]), classes=10)
    attention, swiglu = 4 * 16 * 16 + 16, 3 * 16 * 64 + 2 * 64 + 16
    block = 4 * 16 + attention + swiglu + 2 * 16  # with two norms and two LayerScales
    stem = 3 * 16 * 16 * 16 + 16 + 5 * 16
    assert counted.trained_parameters == 10 * 17
    assert counted.parameters == stem + 2 * block + 2 * 16 + 10 * 17


@pytest.mark.parametrize("method", ["vqt", "lora", "vpt_deep"])
def test_a_published_file_is_trained_and_predicts_from_the_command_line(
    method: str, arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ZOO, "tiny", FILES["dinov3"].row)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    weights, run = FILES["dinov3"].save(tmp_path, arrays), tmp_path / "run"
    size = ["data.image_size=32", "data.workers=0", "train.epochs=1", "train.batch_size=100", "runtime.precision=fp32"]
    words = [method, "data.task=digits", "backbone.name=tiny", f"backbone.weights={weights}", *size, f"run.dir={run}"]
    assert main(["train", *words]) == 0
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["last"]["test"]["loss"] < 5
    assert (run / "adapters.safetensors").exists()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["predict", str(run), str(tmp_path / "a.png")]) == 0
    assert "a.png" in capsys.readouterr().out

"""timm's optimizers by name, resumed to the last bit; layer-wise learning rates equal to timm's own groups."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import Interrupted, UserError
from dist_vpt.methods import attach
from dist_vpt.methods.base import Method
from dist_vpt.methods.layers import layer_scales
from dist_vpt.planning.footprint import footprint
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS, OptimConfig
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training.optim import build_optimizer, check_optimizer, parameter_groups, set_lr
from dist_vpt.training.optimizer_state import gather_optimizer_state, set_optimizer_state
from tests.methods.conftest import KINDS, MEAN, STD, config_of, make_backbone, make_vit
from tests.running import TINY, metrics, train
from tests.training.test_engine import _interrupt_at
from tests.training.test_optim import Few

NAMES = [name for name in get_args(OptimConfig.model_fields["name"].annotation) if name not in TORCH_OPTIMIZERS]
CLASSES = 5


def steps(optimizer: torch.optim.Optimizer, few: Few) -> None:
    draw = torch.Generator().manual_seed(1)
    for step in range(5):
        set_lr(optimizer, 0.01 / (step + 1))
        for _, parameter in few.trainable():
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_timm(name: str) -> None:
    ours, theirs = Few().float(), Few().float()
    steps(build_optimizer(OptimConfig(name=name, lr=0.01, weight_decay=0.1), ours), ours)  # type: ignore[arg-type]
    groups = [
        {"params": [theirs.weight, theirs.prompts], "weight_decay": 0.1},
        {"params": [theirs.bias, theirs.scale], "weight_decay": 0.0},
    ]
    steps(create_optimizer_v2(groups, name, lr=0.01), theirs)
    for (key, one), (_, other) in zip(ours.trainable(), theirs.trainable(), strict=True):
        assert torch.equal(one, other), key
        assert not torch.equal(one, dict(Few().float().trainable())[key]), key


def test_options_reach_timm() -> None:
    recipe = OptimConfig(name="lion", options={"betas": [0.8, 0.7]})
    assert build_optimizer(recipe, Few()).param_groups[0]["betas"] == [0.8, 0.7]  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"beta": 0.9}, {"betas": "x"}, {"betas": [2, 3]}, {"betas": [0.9]}])
def test_options_that_timm_does_not_take_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optim.options = \{'betas?': .*\}: timm's lion does not take them"):
        check_optimizer(OptimConfig(name="lion", options=options))


def test_a_run_with_wrong_options_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="timm's lion does not take them"):
        train(tmp_path / "run", "optim.name=lion", "optim.options={wrong: 1}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_state_continues_to_the_last_bit(name: str, tmp_path: Path) -> None:
    """What optimizers keep besides tensors, and for groups, is saved too."""
    recipe = OptimConfig(name=name, lr=0.01, weight_decay=0.1)
    whole, first, then = (Few().float() for _ in range(3))
    stepped = build_optimizer(recipe, whole)  # type: ignore[arg-type]
    steps(stepped, whole)
    steps(stepped, whole)
    before = build_optimizer(recipe, first)  # type: ignore[arg-type]
    steps(before, first)
    saved = dict(gather_optimizer_state(first, SimpleNamespace(optimizer=before)))  # type: ignore[arg-type]
    save_file(saved, tmp_path / "state.safetensors")
    then.load_state_dict(first.state_dict())
    after = build_optimizer(recipe, then)  # type: ignore[arg-type]
    moments = load_file(tmp_path / "state.safetensors")
    set_optimizer_state(then, SimpleNamespace(optimizer=after), {}, moments, 0)  # type: ignore[arg-type]
    steps(after, then)
    for (key, one), (_, other) in zip(whole.trainable(), then.trainable(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", ["adafactor", "adan", "lamb"])
def test_interrupted_and_resumed_equals_uninterrupted(name: str, data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, "runtime.deterministic=true", f"optim.name={name}", "optim.lr=0.001", "optim.scale_lr=false",
               "train.epochs=2", "train.batch_size=25", "method.prompts=1", "train.test=false")  # fmt: skip
    train(tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(3, patch)  # of 8: in the first epoch
        with pytest.raises(Interrupted, match="stopped at step 3"):
            train(tmp_path / "parts", *options)
    train(tmp_path / "parts", *options, "run.resume=auto")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    one, two = (read_adapters(tmp_path / run / "adapters.safetensors")[0] for run in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("gpus", [False, True])
@pytest.mark.parametrize("name", ["lion", "lamb", "nadamw", "adan", "adafactor"])
def test_their_memory_is_counted(name: str, gpus: bool) -> None:
    recipe = load_recipe([], [*TINY, f"optim.name={name}", "optim.scale_lr=false"])
    counted = footprint(recipe, CLASSES, gpus=gpus)
    states = {"lion": 1, "lamb": 2, "nadamw": 2, "adan": 4, "adafactor": 1}[name]
    assert states * counted.trained <= counted.optimizer < (states + 0.1) * counted.trained


@pytest.mark.parametrize("name", NAMES)
def test_every_one_can_be_counted(name: str) -> None:
    recipe = load_recipe([], [*TINY, f"optim.name={name}", "optim.scale_lr=false"])
    assert footprint(recipe, CLASSES, gpus=True).optimizer > 0


# --- layer-wise learning rates


def make_swin(*, classes: int = 0) -> SwinTransformer:
    torch.manual_seed(0)
    return SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 4),
                           num_classes=classes)  # fmt: skip


def expected_scales(model: nn.Module, decay: float) -> dict[str, tuple[float, float]]:
    """timm's factor of the learning rate, and the weight decay, of each parameter by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=decay)
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def scales_of(method: Method, decay: float) -> dict[str, tuple[float, float]]:
    """Ours, by timm's names."""
    recipe = OptimConfig(layer_decay=decay, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in method.trainable()}
    found = {}
    for group in parameter_groups(recipe, method):
        for parameter in group["params"]:
            name = names[id(parameter)]
            own = name if name.startswith("head.") else name.removeprefix("backbone.")
            found[method.backbone.timm_name(own)] = (group["lr_scale"], group["weight_decay"])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_full_has_timm_s_layers(kind: str) -> None:
    method = attach(config_of({"name": "full"}), make_backbone(kind), CLASSES)
    assert scales_of(method, 0.75) == expected_scales(make_vit(kind, num_classes=CLASSES), 0.75)


def test_so_it_is_on_swin() -> None:
    backbone = SwinBackbone(make_swin(), mean=MEAN, std=STD, stochastic=False)
    method = attach(config_of({"name": "full"}), backbone, CLASSES)
    assert scales_of(method, 0.6) == expected_scales(make_swin(classes=CLASSES), 0.6)


def test_so_it_is_on_a_model_that_timm_makes() -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 12, "num_heads": 3}
    with torch.device("meta"):
        theirs = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **options)
        ours = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    backbone = Backbone(ours, mean=MEAN, std=STD, stochastic=False)
    method = attach(config_of({"name": "full"}), backbone.to_empty(device="cpu"), CLASSES)
    assert scales_of(method, 0.65) == expected_scales(theirs, 0.65)
    scales = layer_scales(method, 0.65)
    assert scales["backbone.stem.patch_embed.proj.weight"] == pytest.approx(0.65**13)
    assert scales["head.weight"] == 1


def test_modules_inside_a_block_have_its_rate() -> None:
    decay, last = 0.5, 4  # the stem, three blocks, the head
    for settings in ({"name": "partial", "blocks": 2}, {"name": "bias"}, {"name": "ssf"}, {"name": "lora", "rank": 2},
                     {"name": "adapter", "bottleneck": 2}, {"name": "adaptformer", "bottleneck": 2}):  # fmt: skip
        scales = layer_scales(attach(config_of(settings), make_backbone(), CLASSES), decay)
        for name, scale in scales.items():
            block = next((int(part) for part in name.split(".") if part.isdigit()), None)
            layer = (
                last if name.startswith("head") else 0 if "patch_embed" in name else 3 if block is None else block + 1
            )
            assert scale == decay ** (last - layer), name
        assert len(set(scales.values())) >= 3


def test_each_step_scales_the_rate_of_the_schedule() -> None:
    method = attach(config_of({"name": "full"}), make_backbone(), CLASSES)
    optimizer = build_optimizer(OptimConfig(name="sgd", layer_decay=0.5, momentum=0), method)
    before = {name: parameter.detach().clone() for name, parameter in method.trainable()}
    for _, parameter in method.trainable():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    set_lr(optimizer, 0.25)
    optimizer.step()
    for name, scale in layer_scales(method, 0.5).items():
        moved = before[name] - dict(method.trainable())[name]
        assert torch.allclose(moved, torch.full_like(moved, 0.25 * scale), atol=1e-6), name


def test_without_it_the_groups_are_as_before() -> None:
    method = attach(config_of({"name": "full"}), make_backbone(), CLASSES)
    groups = parameter_groups(OptimConfig(), method)
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2


def test_a_run_with_them_learns(tmp_path: Path) -> None:
    train(tmp_path / "run", "method.name=partial", "method.blocks=3", "optim.name=nadamw", "optim.layer_decay=0.7",
          "optim.lr=0.002", "optim.scale_lr=false", "train.epochs=2", "train.batch_size=50")  # fmt: skip
    found = [line["loss"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert found[-1] < 0.8 * found[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last"]["test"]["top1"] > 50

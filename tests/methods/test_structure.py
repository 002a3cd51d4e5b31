"""What is trained, what is frozen, and how a method starts."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from timm.layers import SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock

from dist_vpt.errors import UserError
from dist_vpt.methods import METHODS, attach
from dist_vpt.methods.base import Method, Reader
from dist_vpt.methods.vpt import VPT
from dist_vpt.recipe.schema import OptimConfig
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.training.optim import build_optimizer, set_lr
from tests.methods.conftest import KINDS, assert_equal_steps, config_of, make_backbone

HEAD = {"head.weight", "head.bias"}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "logistic": {"name": "logistic"},
    "full": {"name": "full"},
    "vpt shallow": {"name": "vpt", "deep": False},
    "vpt deep": {"name": "vpt"},
    "vpt projected": {"name": "vpt", "projection": 4},
    "vpt shared": {"name": "vpt", "shared": True},
    "vpt, first two without expansion": {"name": "vpt", "layers": 2, "expand": False},
    "vpt added": {"name": "vpt", "location": "add"},
    "vpt pixels": {"name": "vpt", "location": "prepend-pixel", "deep": False},
    "vpt frame": {"name": "vpt", "location": "pad", "deep": False, "prompts": 2},  # around images of 12 pixels
    "vpt below": {"name": "vpt", "location": "below", "deep": False, "prompts": 2},
    "vpt+bias": {"name": "vpt", "extra_trainable": ("bias",)},
    "vpt+cls": {"name": "vpt", "extra_trainable": ("cls",)},
    "vqt": {"name": "vqt", "queries": 2},
    "vqt weighted": {"name": "vqt", "queries": 2, "pooling": "weighted", "blocks": (1, 2)},
    "mlp": {"name": "mlp", "layers": 3, "width": 8},
    "mlp of one layer": {"name": "mlp", "layers": 1},
    "side": {"name": "side", "layers": 2, "channels": 4},
    "combo": {"name": "combo", "width": 8, "depth": 1},
    "ladder": {"name": "ladder", "reduction": 2, "heads": 2},
    "ladder last": {"name": "ladder", "kind": "last", "rank": 4},
    "partial": {"name": "partial", "blocks": 2},
    "bias": {"name": "bias"},
    "cls": {"name": "cls"},
    "cls reinit": {"name": "cls", "reinit": True},
    "lora": {"name": "lora", "rank": 2, "targets": ("v", "fc1")},
    "pfeiffer": {"name": "adapter", "bottleneck": 3},
    "houlsby": {"name": "adapter", "bottleneck": 3, "style": "houlsby"},
    "adaptformer": {"name": "adaptformer", "bottleneck": 3},
    "ssf": {"name": "ssf"},
}
INSIDE = [name for name, settings in SETTINGS.items() if settings["name"] in ("bias", "cls", "lora", "ssf")]
INSIDE += ["partial", "pfeiffer", "houlsby", "adaptformer"]
OPERATIONS = ["patch_embed.proj", "norm"] + [
    f"blocks.{block}.{layer}"
    for block in range(3)
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
]
LAYER = {f"{layer}.{kind}" for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2") for kind in ("weight", "bias")}
BOTTLENECK = ("down.weight", "down.bias", "up.weight", "up.bias")
TRAINED = {
    "linear": HEAD,
    "logistic": HEAD,
    "full": HEAD | {f"backbone.{name}" for name, _ in make_backbone().named_parameters()},
    "vpt shallow": HEAD | {"prompts"},
    "vpt deep": HEAD | {"prompts"},
    "vpt projected": HEAD | {"prompts", "projection.weight", "projection.bias"},
    "vpt shared": HEAD | {"prompts"},
    "vpt, first two without expansion": HEAD | {"prompts"},
    "vpt added": HEAD | {"prompts"},
    "vpt pixels": HEAD | {"prompts"},
    "vpt frame": HEAD | {"prompts"},
    "vpt below": HEAD | {"prompts", "projection.weight", "projection.bias"},
    "vpt+bias": HEAD | {"prompts"} | {f"biases.{layer}.bias" for layer in OPERATIONS},
    "vpt+cls": HEAD | {"prompts", "class_token.token"},
    "vqt": HEAD | {"queries"},
    "vqt weighted": HEAD | {"queries", "pool_weights"},
    "mlp": {f"head.{layer}.{kind}" for layer in (0, 3, 6) for kind in ("weight", "bias")},
    "mlp of one layer": {"head.0.weight", "head.0.bias"},
    "side": HEAD | {"blend"} | {f"side.{layer}.{kind}" for layer in (0, 2, 6) for kind in ("weight", "bias")},
    "combo": HEAD
    | {"projection.weight", "projection.bias", "class_token", "positions", "norm.weight", "norm.bias"}
    | {f"layers.0.{name}" for name in LAYER},
    "ladder": HEAD
    | {"gates", "norm.weight", "norm.bias", "up.weight", "up.bias"}
    | {f"layers.{block}.{name}" for block in range(3) for name in LAYER}
    | {f"down.{block}.{kind}" for block in range(3) for kind in ("weight", "bias")},
    "ladder last": HEAD
    | {
        f"layers.{block}.{name}"
        for block in range(3)
        for name in ("norm.weight", "norm.bias", "qkv.weight", "up.weight")
    },
    "partial": HEAD
    | {
        f"backbone.{layer}.{kind}"
        for layer in OPERATIONS
        if layer == "norm" or layer.startswith(("blocks.1", "blocks.2"))
        for kind in ("weight", "bias")
    },
    "bias": HEAD | {f"biases.{layer}.bias" for layer in OPERATIONS},
    "cls": HEAD | {"class_token.token"},
    "cls reinit": HEAD | {"class_token.token"},
    "lora": HEAD
    | {f"lora.{block}.{at}.{kind}.weight" for block in range(3) for at in ("v", "fc1") for kind in ("down", "up")},
    "pfeiffer": HEAD | {f"adapters.{block}.mlp.{tensor}" for block in range(3) for tensor in BOTTLENECK},
    "houlsby": HEAD
    | {f"adapters.{block}.{branch}.{name}" for block in range(3) for branch in ("attn", "mlp") for name in BOTTLENECK},
    "adaptformer": HEAD | {f"adapters.{block}.{tensor}" for block in range(3) for tensor in BOTTLENECK},
    "ssf": HEAD | {f"ssf.{layer}.{kind}" for layer in OPERATIONS for kind in ("scale", "shift")},
}


class WithoutLayers(torch.nn.Module):
    """An MLP of another structure."""

    def __init__(self, in_features: int, **_: Any):
        super().__init__()


def make(settings: dict[str, Any], compute: torch.dtype = torch.float32, **backbone: Any) -> Method:
    torch.manual_seed(0)
    return attach(config_of(settings), make_backbone(**backbone), 5, compute)


def loss_of(method: Method, images: torch.Tensor) -> torch.Tensor:
    frame = method.recipe.frame if isinstance(method, VPT) else 0
    images = images[:, :, frame : 16 - frame, frame : 16 - frame]
    return F.cross_entropy(method(images), torch.arange(len(images)))


def test_every_method_is_tested() -> None:
    assert {settings["name"] for settings in SETTINGS.values()} == set(METHODS) - {
        "knn"
    }  # trains nothing: test_probes.py
    assert SETTINGS.keys() == TRAINED.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_trained_names(name: str) -> None:
    assert {n for n, _ in make(SETTINGS[name]).trainable()} == TRAINED[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recipe_states_what_its_method_reads(name: str) -> None:
    method, recipe = make(SETTINGS[name]), config_of(SETTINGS[name])
    assert recipe.reader == isinstance(method, Reader)
    assert recipe.reads_blocks == (isinstance(method, Reader) and bool(method.spec.blocks))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_change_what_is_trained_and_nothing_else(name: str, optimizer: str, images: torch.Tensor) -> None:
    method = make(SETTINGS[name])
    before = copy.deepcopy(method.state_dict())
    steps = build_optimizer(OptimConfig(name=optimizer, weight_decay=0.01), method)
    set_lr(steps, 0.01)
    for _ in range(2):
        method.train()
        loss_of(method, images).backward()
        steps.step()
        steps.zero_grad()
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in TRAINED[name]), key
    assert {key for key in before if key not in dict(method.named_buffers())} >= TRAINED[name]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("policy", ["mlp", "block", "every-2", "budget-0.5"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_checkpointing_changes_nothing(
    settings: dict[str, Any], policy: str, compute: torch.dtype, images: torch.Tensor
) -> None:
    plain, checkpointed = make(settings, compute), make(settings, compute)
    apply_checkpointing(checkpointed.backbone, policy)
    assert_equal_steps(plain, checkpointed, lambda method: loss_of(method, images))


@pytest.mark.parametrize("name", ["linear", "mlp of one layer"])
def test_a_head_keeps_nothing_of_the_backbone(name: str, images: torch.Tensor) -> None:
    method = make(SETTINGS[name])
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        loss_of(method, images).backward()
    assert saved
    assert all(shape in {(3, 16), (5, 16), (16, 5), (3, 5), (3,), ()} for shape in saved), saved


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if config_of(s).reader])
def test_a_reader_sees_the_stream_without_autograd(name: str, images: torch.Tensor) -> None:
    method = make(SETTINGS[name])
    asked: list[bool] = []
    for block in method.backbone.blocks:
        block.register_forward_hook(
            lambda _, inputs, output: asked.append(output.requires_grad or inputs[0].requires_grad)
        )
    loss_of(method, images).backward()
    assert asked == [False] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in INSIDE if name != "cls reinit"])
def test_a_method_inside_starts_as_the_frozen_backbone(name: str, kind: str, images: torch.Tensor) -> None:
    if name == "cls" and kind == "no_class_token":
        return
    heads = []
    for settings in (SETTINGS[name], {"name": "linear"}):
        method = make(settings, kind=kind)
        method.head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].detach()))
        method.train()(images)
    assert torch.allclose(*heads, atol=1e-5)


@pytest.mark.parametrize("name", INSIDE)
def test_a_method_inside_widens_no_tokens(name: str, images: torch.Tensor) -> None:
    """Under bf16, backward keeps no float32 numbers of tokens but a few a token (a norm's mean, attention's sums)."""
    torch.manual_seed(0)
    recipe = config_of(SETTINGS[name])
    method = attach(recipe, make_backbone(), 5, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss_of(method, images).backward()
    tokens = [t for t in saved if t.ndim >= 3 and len(t) == len(images) and t[0].numel() >= 5 * 8]  # N x E
    assert tokens
    allowed = torch.bfloat16 if name != "partial" else torch.float32  # under autocast torch's norms are of float32
    assert {t.dtype for t in tokens} <= {torch.bfloat16, allowed}


def test_the_blocks_before_the_last_run_without_autograd(images: torch.Tensor) -> None:
    method = make(SETTINGS["partial"])
    asked: list[bool] = []
    for block in method.backbone.blocks:
        block.register_forward_hook(lambda _, inputs, output: asked.append(output.requires_grad))
    loss_of(method, images).backward()
    assert asked == [False, True, True]


def test_dropout_of_lora_is_off_in_eval(images: torch.Tensor) -> None:
    method = make(SETTINGS["lora"] | {"dropout": 0.5})
    for name, parameter in method.trainable():
        if ".up." in name:
            torch.nn.init.normal_(parameter)
    method.train()
    assert not torch.equal(method(images), method(images))
    method.eval()
    assert torch.equal(method(images), method(images))


@pytest.mark.parametrize(
    ("settings", "backbone", "message"),
    [
        ({"name": "partial", "blocks": 4}, {}, "method.blocks = 4: the backbone has 3 blocks"),
        ({"name": "cls"}, {"kind": "no_class_token"}, "no class token"),
        ({"name": "lora"}, {"block_fn": ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"name": "lora", "targets": ("fc1",)}, {"mlp_layer": WithoutLayers}, "no linear layer mlp.fc1: leave fc1 out"),
    ],
)
def test_a_backbone_that_a_method_does_not_know_is_refused(
    settings: dict[str, Any], backbone: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(settings, **backbone)


@pytest.mark.parametrize("backbone", [{"mlp_layer": SwiGLU}, {"kind": "dinov3_swiglu"}], ids=["Block", "EvaBlock"])
def test_lora_has_two_updates_where_a_swiglu_has_two_first_layers(backbone: dict[str, Any]) -> None:
    method = make({"name": "lora", "rank": 2, "targets": ("fc1",)}, **backbone)
    layers = {f"lora.{block}.{layer}" for block in range(3) for layer in ("fc1_g", "fc1_x")}
    assert {n for n, _ in method.trainable()} == HEAD | {
        f"{at}.{kind}.weight" for at in layers for kind in ("down", "up")
    }


def test_the_backbone_stays_in_eval_mode() -> None:
    method = make({"name": "vpt"}).train()
    assert method.training
    assert not any(module.training for module in method.backbone.modules())


def test_stochastic_depth_trains_in_train_mode_alone(images: torch.Tensor) -> None:
    method = make({"name": "full"}, drop_path_rate=0.9, stochastic=True)
    method.train()
    torch.manual_seed(0)
    first = method(images)
    assert not torch.equal(first, method(images))
    method.eval()
    assert torch.equal(method(images), method(images))


def test_prompt_dropout_is_drawn_per_image_and_off_in_eval(images: torch.Tensor) -> None:
    same = images[:1].expand(3, -1, -1, -1)
    method = make({"name": "vpt", "dropout": 0.5})
    method.train()
    rows = method(same)
    assert not torch.allclose(rows[0], rows[1])
    method.eval()
    rows = method(same)
    assert torch.allclose(rows[0], rows[1], atol=1e-6)


def test_prompts_start_as_published() -> None:
    backbone = make_backbone(embed_dim=64, num_heads=2)
    method = attach(config_of({"name": "vpt", "prompts": 50}), backbone, 5)
    bound = math.sqrt(6 / (3 * 8 * 8 + 64))
    assert method.prompts.shape == (3, 50, 64)
    assert bound * 0.99 < method.prompts.abs().max() <= bound
    assert abs(float(method.prompts.detach().std()) / (bound / math.sqrt(3)) - 1) < 0.02
    assert torch.all(method.head.bias == -math.log(99.0))
    assert abs(float(method.head.weight.detach().std()) / math.sqrt(2 / 5) - 1) < 0.2


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("start", ["class_token", "tokens"])
def test_prompts_may_start_like_tokens(start: str, deep: bool, images: torch.Tensor) -> None:
    many = {"name": "vpt", "prompts": 20000, "deep": deep}
    method, random = make(many | {"init": start}), make(many)
    inputs: list[torch.Tensor] = []
    for block in method.backbone.blocks:
        block.register_forward_pre_hook(lambda _, tokens: inputs.append(tokens[0]))
    method.backbone(images)
    seen = [tokens[:, :1] if start == "class_token" else tokens for tokens in inputs]
    method.init_from_images([images[:2], images[2:]], seed=5)
    assert len(method.prompts) == (3 if deep else 1)
    for prompts, before, tokens in zip(method.prompts, random.prompts, seen, strict=False):
        drawn, values = (prompts - before).detach(), tokens.flatten(0, 1)
        deviation = values.std(0, correction=0)
        assert torch.allclose(drawn.mean(0), values.mean(0), atol=0.05 * float(values.std()))
        assert torch.allclose(drawn.std(0), deviation, atol=0.05 * float(values.std()))
    again = make(many | {"init": start})
    again.init_from_images([images], seed=5)
    assert torch.allclose(again.prompts, method.prompts, atol=1e-5)


def test_a_class_token_to_start_from_is_needed() -> None:
    with pytest.raises(UserError, match=r"method.init = class_token: the backbone has none"):
        make({"name": "vpt", "init": "class_token"}, kind="no_class_token")


def test_what_is_trained_is_float32_beside_a_bf16_backbone(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    backbone = make_backbone()
    method = attach(config_of({"name": "vpt"}), backbone, 5, torch.bfloat16)
    assert {p.dtype for _, p in method.trainable()} == {torch.float32}
    assert {p.dtype for p in method.backbone.parameters()} == {torch.bfloat16}
    assert backbone.mean.dtype == torch.float32
    assert method(images).dtype == torch.float32


@pytest.mark.parametrize("layers", [1, 2])
def test_before_the_last_blocks_there_are_no_prompt_tokens(layers: int, images: torch.Tensor) -> None:
    method = make({"name": "vpt", "prompts": 3, "layers": layers, "prompted_blocks": "last"})
    backbone, seen = method.backbone, []
    frozen_BND = backbone.embed(images)
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method(images)
    entered, seen[:] = list(seen), []
    backbone(images)
    first = len(backbone.blocks) - layers
    assert torch.equal(entered[0], frozen_BND)
    assert all(torch.equal(one, other) for one, other in zip(entered[:first], seen[:first], strict=True))
    assert [tokens_BND.shape[1] for tokens_BND in entered] == [5] * first + [8] * layers
    assert torch.equal(entered[first][:, 1:4], method.prompts[0].expand(3, -1, -1))
    assert torch.equal(entered[first][:, 4:], seen[first][:, 1:])  # the patches, all of them


def test_more_layers_than_blocks_are_refused() -> None:
    with pytest.raises(UserError, match=r"method.layers = 4: the backbone has 3 blocks"):
        make({"name": "vpt", "layers": 4})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deep": False, "layers": 2}, "these need deep prompts"),
        ({"expand": False}, "expand = false with layers = None"),
        (
            {"expand": False, "layers": 2, "prompted_blocks": "last"},
            "expand = false with layers = 2, prompted_blocks = last",
        ),
        ({"expand": False, "layers": 2, "pooling": "prompt_pool"}, "no prompts come out of the last block"),
        ({"location": "add", "pooling": "imgprompt_pool"}, "no prompts come out of the last block"),
        ({"location": "prepend-pixel"}, "location = prepend-pixel: there are pixels only before the first block"),
        ({"location": "pad"}, "location = pad: there are pixels only before the first block"),
        ({"location": "below", "deep": False, "projection": 4}, "set deep=false and projection=null"),
        ({"location": "below", "deep": False, "pooling": "prompt_pool"}, "no prompts come out of the last block"),
        ({"extra_trainable": ("bias", "bias")}, "each only once"),
        ({"init": "tokens", "projection": 4}, "only prompts that are tokens can be drawn like tokens"),
    ],
)
def test_options_of_vpt_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make({"name": "vpt", **settings})

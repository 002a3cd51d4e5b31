"""Swin as a backbone: against slow float64 mathematics, and with everything that runs on a backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from dist_vpt.backbones.build import build, preprocessing_of
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamSpec, compute_stream
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.merge import timm_tensors
from dist_vpt.methods import METHODS, attach
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import OptimConfig
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.attention import apply_attention
from dist_vpt.training.optim import build_optimizer, set_lr
from tests.backbones.published import FILES
from tests.methods.conftest import assert_equal_steps, config_of
from tests.reference import swin as reference
from tests.running import train

MEAN, STD = (0.45, 0.5, 0.4), (0.2, 0.25, 0.3)
SHAPE = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2, "num_classes": 0}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}  # relative to the largest number
LABELS = torch.tensor([0, 2, 1])
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "mlp": {"name": "mlp", "layers": 2, "width": 8},
    "side": {"name": "side", "layers": 2, "channels": 4},
    "full": {"name": "full"},
    "vpt deep": {"name": "vpt", "prompts": 3},
    "vpt shallow": {"name": "vpt", "prompts": 2, "deep": False},
    "vpt, last three": {
        "name": "vpt",
        "prompts": 1,
        "layers": 3,
        "prompted_blocks": "last",
        "pooling": "imgprompt_pool",
    },
    "vpt, first three": {"name": "vpt", "prompts": 2, "layers": 3, "pooling": "prompt_pool", "init": "tokens"},
    "vpt, first without expansion": {"name": "vpt", "prompts": 2, "layers": 1, "expand": False},
}
# (stage, block) before which each set of prompts goes in, tensor by tensor.
WRITTEN = {
    "vpt deep": {"prompts_0": [(0, 0), (0, 1)], "prompts_1": [(1, 0), (1, 1)]},
    "vpt shallow": {"prompts": [(0, 0)]},
    "vpt, last three": {"prompts_0": [(0, 1)], "prompts_1": [(1, 0), (1, 1)]},
    "vpt, first three": {"prompts_0": [(0, 0), (0, 1)], "prompts_1": [(1, 0)]},
    "vpt, first without expansion": {"prompts": [(0, 0)]},
}


def make_swin(**changes: Any) -> SwinTransformer:
    torch.manual_seed(0)
    swin = SwinTransformer(**(SHAPE | {"drop_path_rate": 0.0} | changes))
    with torch.no_grad():
        for name, parameter in swin.named_parameters():
            noise = torch.randn_like(parameter) * 0.3
            parameter.copy_(1 + noise if "norm" in name and "weight" in name else noise)
    return swin


def make_backbone(dtype: torch.dtype = torch.float32, *, stochastic: bool = False, **changes: Any) -> SwinBackbone:
    backbone = SwinBackbone(make_swin(**changes), mean=MEAN, std=STD, stochastic=stochastic)
    backbone.requires_grad_(False).to(dtype)
    for name, values in (("mean", MEAN), ("std", STD)):  # not rounded to float32 on the way
        setattr(backbone, name, torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) * 255)
    return backbone


def make(settings: dict[str, Any], dtype: torch.dtype = torch.float32, **backbone: Any) -> Method:
    recipe = config_of(settings)
    torch.manual_seed(3)
    return attach(recipe, make_backbone(dtype, **backbone), 4, dtype)


def published(swin: SwinTransformer) -> dict[str, np.ndarray]:
    """Weights under the published names, where patches are merged at the end of a stage."""
    return {
        name.replace("layers.1.downsample", "layers.0.downsample"): tensor.double().numpy()
        for name, tensor in swin.state_dict().items()
    }


def expected(weights: dict[str, np.ndarray], images: Tensor, **prompts: Any) -> np.ndarray:
    return reference.features(weights, images.numpy(), heads=(2, 4), window=2, mean=MEAN, std=STD, **prompts)


def with_prompts(name: str, dtype: torch.dtype) -> Method:
    """A method whose prompts are as large as tokens, so that none of them is lost beside the others."""
    method = make(SETTINGS[name], dtype).to(dtype)
    for key, parameter in method.trainable():
        if key in WRITTEN[name]:
            torch.nn.init.normal_(parameter)
    return method


def reference_logits(name: str, method: Method, images: Tensor, values: dict[str, np.ndarray]) -> np.ndarray:
    """What the reference makes of prompts, by tensor, with the method's head."""
    prompts = {at: values[key][i] for key, places in WRITTEN[name].items() for i, at in enumerate(places)}
    if not SETTINGS[name].get("expand", True):
        prompts[0, 1] = np.zeros((0, 8))
    pooling = SETTINGS[name].get("pooling", "img_pool")
    weight_KD, bias_K = (p.detach().double().numpy() for p in (method.head.weight, method.head.bias))
    return expected(published(make_swin()), images, prompts=prompts, pooling=pooling) @ weight_KD.T + bias_K


def loss_of(method: Method, images: Tensor) -> Tensor:
    return F.cross_entropy(method(images), LABELS)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_features_are_the_references(dtype: torch.dtype, kernel: str, images: Tensor) -> None:
    backbone = make_backbone(dtype)
    apply_attention(backbone, kernel, torch.float32, writes=False, cpu=True)
    found_BD = backbone.pool(backbone(images)).double().numpy()
    wanted_BD = expected(published(make_swin()), images)
    assert found_BD.shape == wanted_BD.shape == (3, backbone.width)
    assert np.abs(found_BD - wanted_BD).max() < TOLERANCE[dtype] * np.abs(wanted_BD).max()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_features_in_bf16_are_near(kernel: str, images: Tensor) -> None:
    backbone = make_backbone().hold_in(torch.bfloat16)
    apply_attention(backbone, kernel, torch.float32, writes=False, cpu=True)
    assert backbone.dtype == torch.bfloat16
    found_BD = backbone.pool(backbone(images)).double().numpy()
    wanted_BD = expected(published(make_swin()), images)
    assert np.linalg.norm(found_BD - wanted_BD) < 0.03 * np.linalg.norm(wanted_BD)


@pytest.mark.parametrize("name", ["linear", "full"])
def test_a_kernel_must_take_the_bias_of_scores_as_the_method_has_it(name: str, images: Tensor) -> None:
    """On a CPU flash attention takes one that is frozen, and none that is trained."""
    method = make(SETTINGS[name])
    if name == "full":
        message = "attention = sdpa_flash: .* heads of width 64, with a trained bias on their scores; set"
        with pytest.raises(UserError, match=message):
            apply_attention(method.backbone, "sdpa_flash", torch.float32, writes=True, cpu=True)
    else:
        wanted = method(images)
        apply_attention(method.backbone, "sdpa_flash", torch.float32, writes=False, cpu=True)
        assert torch.allclose(method(images), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_all_weights_are_the_references(images: Tensor) -> None:
    """Along one random direction of each tensor, against the reference's own slope there."""
    method = make(SETTINGS["full"]).double().train()
    method.backbone = make_backbone(torch.float64).requires_grad_(True)
    loss_of(method, images[:1].expand(3, -1, -1, -1)).backward()
    swin = make_swin()
    weight_KD, bias_K = (p.detach().numpy() for p in (method.head.weight, method.head.bias))

    def loss(weights: dict[str, np.ndarray]) -> float:
        logits_K = expected(weights, images[:1])[0] @ weight_KD.T + bias_K
        shifted_K = logits_K - logits_K.max()
        return float(np.mean(np.log(np.exp(shifted_K).sum()) - shifted_K[LABELS.numpy()]))

    weights, random = published(swin), np.random.default_rng(7)
    own = {id(p): name for name, p in _published_parameters(method.backbone)}
    assert set(own.values()) == set(weights)
    for parameter in method.backbone.parameters():
        name = own[id(parameter)]
        direction = random.normal(size=weights[name].shape)
        step = 1e-5
        up, down = (loss(weights | {name: weights[name] + sign * step * direction}) for sign in (1, -1))
        assert parameter.grad is not None, name
        found = float((parameter.grad.numpy() * direction).sum())
        scale = float(np.linalg.norm(parameter.grad.numpy()) * np.linalg.norm(direction))
        assert abs(found - (up - down) / (2 * step)) < 1e-6 * scale, name


def _published_parameters(backbone: SwinBackbone) -> list[tuple[str, torch.nn.Parameter]]:
    """The backbone's parameters under the published names, by its own list of blocks."""
    found = [(f"patch_embed.{name}", p) for name, p in backbone.stem.named_parameters()]
    found += [(f"norm.{name}", p) for name, p in backbone.norm.named_parameters()]
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (stage, block), module in zip(places, backbone.blocks, strict=True):
        for name, parameter in module.named_parameters():
            of_stage = name.startswith("downsample")  # merging belongs to the last block of a stage
            found.append((f"layers.{stage}.{name}" if of_stage else f"layers.{stage}.blocks.{block}.{name}", parameter))
    return found


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", WRITTEN)
def test_logits_with_prompts_are_the_references(name: str, dtype: torch.dtype, kernel: str, images: Tensor) -> None:
    method = with_prompts(name, dtype).eval()
    apply_attention(method.backbone, kernel, torch.float32, writes=True, cpu=True)
    values = {key: p.detach().double().numpy() for key, p in method.trainable() if key in WRITTEN[name]}
    assert {key: len(value) for key, value in values.items()} == {key: len(at) for key, at in WRITTEN[name].items()}
    wanted_BK = reference_logits(name, method, images, values)
    found_BK = method(images).detach().double().numpy()
    assert np.abs(found_BK - wanted_BK).max() < TOLERANCE[dtype] * np.abs(wanted_BK).max()


@pytest.mark.parametrize("name", WRITTEN)
def test_gradients_of_prompts_are_the_references(name: str, images: Tensor) -> None:
    """Along random directions of each set of prompts, against the reference's own slope there."""
    method, some = with_prompts(name, torch.float64).train(), images[:2]
    F.cross_entropy(method(some), LABELS[:2]).backward()
    parameters = {key: p for key, p in method.trainable() if key in WRITTEN[name]}
    values = {key: p.detach().numpy() for key, p in parameters.items()}

    def loss(changed: dict[str, np.ndarray]) -> float:
        logits_BK = reference_logits(name, method, some, changed)
        shifted_BK = logits_BK - logits_BK.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted_BK).sum(1)) - shifted_BK[[0, 1], LABELS[:2].numpy()]))

    random, step = np.random.default_rng(7), 1e-5
    for key, parameter in parameters.items():
        assert parameter.grad is not None, key
        for i, grad_PD in enumerate(parameter.grad.numpy()):
            direction = np.zeros_like(values[key])
            direction[i] = random.normal(size=grad_PD.shape)
            up, down = (loss(values | {key: values[key] + sign * step * direction}) for sign in (1, -1))
            slope, found = (up - down) / (2 * step), float((grad_PD * direction[i]).sum())
            assert abs(found - slope) < 1e-6 * np.linalg.norm(grad_PD) * np.linalg.norm(direction), (key, i)
            assert np.linalg.norm(grad_PD) > 0, (key, i)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_change_what_is_trained_and_nothing_else(name: str, images: Tensor) -> None:
    method = make(SETTINGS[name])
    trained = {n for n, _ in method.trainable()}
    heads = {n for n, _ in method.named_parameters() if n.startswith(("head.", "side.", "blend"))}
    assert trained == heads | set(WRITTEN.get(name, ())) | {
        n for n, _ in method.named_parameters() if name == "full" and n.startswith("backbone.")
    }
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    steps = build_optimizer(OptimConfig(name="adamw", weight_decay=0.01), method)
    set_lr(steps, 0.01)
    for _ in range(2):
        method.train()
        loss_of(method, images).backward()
        steps.step()
        steps.zero_grad()
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in trained), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_full_under_autocast(kernel: str, dtype: torch.dtype, images: Tensor) -> None:
    recipe = config_of(SETTINGS["full"])
    methods = []
    for compute in (torch.float32, dtype):
        torch.manual_seed(3)
        methods.append(attach(recipe, make_backbone(), 4, compute).train())
        apply_attention(methods[-1].backbone, kernel, torch.float32, writes=True, cpu=True)
        loss_of(methods[-1], images).backward()
    for (name, a), (_, b) in zip(methods[0].trainable(), methods[1].trainable(), strict=True):
        assert (a.grad - b.grad).norm() <= 0.1 * a.grad.norm(), name


@pytest.mark.parametrize("policy", ["mlp", "block", "every-2", "budget-0.5"])
@pytest.mark.parametrize("name", SETTINGS)
def test_checkpointing_changes_nothing(name: str, policy: str, images: Tensor) -> None:
    plain, checkpointed = make(SETTINGS[name]), make(SETTINGS[name])
    apply_checkpointing(checkpointed.backbone, policy)
    assert_equal_steps(plain, checkpointed, lambda method: loss_of(method, images))


def test_prompts_in_bf16_are_near(images: Tensor) -> None:
    recipe = config_of(SETTINGS["vpt deep"])
    found = []
    for compute in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        method = attach(recipe, make_backbone(), 4, compute)
        loss_of(method, images).backward()
        assert {p.dtype for _, p in method.trainable()} == {torch.float32}
        found.append(torch.cat([p.grad.flatten() for _, p in method.trainable()]))
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


@pytest.mark.parametrize("name", ["linear", "full"])
def test_merged_weights_are_plain_timms(name: str, images: Tensor) -> None:
    method = make(SETTINGS[name])
    with torch.no_grad():
        for _, parameter in method.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = make_swin(num_classes=4).eval()
    plain.load_state_dict(timm_tensors(method), strict=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.allclose(plain((images / 255 - mean) / std), method.eval()(images), atol=1e-4)


def test_stochastic_depth_drops_a_branch_for_prompts_and_patches_alike(images: Tensor) -> None:
    method = make(SETTINGS["vpt deep"], drop_path_rate=0.5, stochastic=True).train()
    branches: list[Tensor] = []
    for block in method.backbone.blocks:
        for drop in (block.drop_path1, block.drop_path2):
            drop.register_forward_hook(lambda _, inputs, output: branches.append(output.flatten(1)))
    method(images)
    dropped = [(branch == 0).float().mean(1) for branch in branches]
    assert all(share in (0, 1) for shares in dropped for share in shares.tolist())
    assert 0 < float(torch.cat(dropped).mean()) < 1


def test_prompts_of_a_stage_may_start_like_its_tokens(images: Tensor) -> None:
    method = make({"name": "vpt", "prompts": 20000, "init": "tokens"})
    before = [prompts_PD.clone() for prompts_PD in method.sets]
    method.init_from_images([images[:2], images[2:]], seed=5)
    tokens_BND = method.backbone.embed(images)
    for block, prompts_PD, first_PD in zip(method.backbone.blocks, method.sets, before, strict=True):
        drawn_PD, values_XD = (prompts_PD - first_PD).detach(), tokens_BND.flatten(0, 1)
        assert torch.allclose(drawn_PD.mean(0), values_XD.mean(0), atol=0.05 * float(values_XD.std()))
        assert torch.allclose(drawn_PD.std(0), values_XD.std(0, correction=0), atol=0.05 * float(values_XD.std()))
        tokens_BND = block(tokens_BND)


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("mlp", 2), ("block", 2)])
def test_the_mlps_of_all_stages_are_computed_again(policy: str, times: int, images: Tensor) -> None:
    method, run = make(SETTINGS["full"]).train(), []
    for module in method.backbone.modules():
        if isinstance(module, Mlp):
            module.fc1.register_forward_hook(lambda layer, *_: run.append(layer))
    apply_checkpointing(method.backbone, policy)
    loss_of(method, images).backward()
    assert len(run) == 4 * times
    assert len(set(run)) == 4


def test_the_frozen_stream_holds_the_pooled_features(images: Tensor) -> None:
    backbone = make_backbone()
    observed = compute_stream(backbone, images, StreamSpec())
    assert torch.equal(observed.pooled, backbone.pool(backbone(images)))
    assert not observed.pooled.requires_grad


def test_stochastic_depth_trains_in_train_mode_alone(images: Tensor) -> None:
    method = make(SETTINGS["full"], drop_path_rate=0.9, stochastic=True).train()
    assert not torch.equal(method(images), method(images))
    method.eval()
    assert torch.equal(method(images), method(images))
    assert not make(SETTINGS["full"], drop_path_rate=0.9).train().backbone.training


@pytest.mark.parametrize(
    "name", sorted(set(METHODS) - {"knn", "logistic"} - {settings["name"] for settings in SETTINGS.values()})
)
def test_methods_that_need_a_list_of_tokens_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"method.name = {name}: not on Swin, whose tokens attend within windows"):
        make({"name": name})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"location": "add"}, "method.location = add: on Swin prompts are prepended to the patches of each window"),
        ({"projection": 4}, "method.projection = 4: on Swin the prompts of each stage have another width"),
        ({"shared": True}, "method.shared = True: on Swin the prompts of each stage have another width"),
        (
            {"extra_trainable": ("bias",)},
            r"method.extra_trainable = \['bias'\]: the method of that name does not support Swin; leave it out",
        ),
        ({"init": "class_token"}, "method.init = class_token: the backbone has none; set method.init=tokens"),
        ({"deep": False, "pooling": "prompt_pool"}, "written before block 0, and patches are merged after it, which"),
        ({"layers": 5}, "method.layers = 5: the backbone has 4 blocks"),
    ],
)
def test_what_prompts_on_swin_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make({"name": "vpt", **settings})


def built(name: str, image_size: int, **settings: Any) -> SwinBackbone:
    recipe = BackboneConfig(name=name, weights="random", **settings)
    wants = preprocessing_of(recipe)
    backbone, _ = build(recipe, image_size=image_size, mean=wants.mean, std=wants.std)
    assert isinstance(backbone, SwinBackbone)
    return backbone


def test_a_published_swin_is_built() -> None:
    backbone = built("swin_t_in1k", 224)
    assert (backbone.width, len(backbone.blocks), backbone.tokens) == (768, 2 + 2 + 6 + 2, 49)
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "size", "fix"),
    [
        ("tiny", 48, "a multiple of 32; use data.image_size=32 or 64"),
        ("tiny", 16, "a multiple of 32; use data.image_size=32"),
        ("swin_tiny_patch4_window7_224", 256, "a multiple of 224; use data.image_size=224 or 448"),
    ],
)
def test_an_image_size_that_windows_do_not_tile(
    name: str, size: int, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ZOO, "tiny", FILES["swin"].row)
    with pytest.raises(UserError) as caught:
        built(name, size)
    assert str(caught.value).startswith(f"image size {size}: Swin's windows of ")
    assert str(caught.value).endswith(fix)


def test_swin_has_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ZOO, "tiny", FILES["swin"].row)
    recipe = BackboneConfig(name="tiny", weights="random")
    with pytest.raises(UserError, match=r"method.location = pad: on Swin prompts are prepended to the patches"):
        build(recipe, image_size=32, mean=MEAN, std=STD, frame=2)


def test_swin_has_no_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ZOO, "tiny", FILES["swin"].row)
    with pytest.raises(
        UserError, match=r"backbone.global_pool = token: Swin has the mean of its patches, and no class token"
    ):
        built("tiny", 32, global_pool="token")


# A whole run


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", ["stream.cache=memory"]),
        ("mlp", ["method.width=8"]),
        ("full", ["runtime.activation_checkpointing=block"]),
        ("vpt", ["method.prompts=2", "method.init=tokens", "runtime.activation_checkpointing=mlp"]),
    ],
)
def test_a_run_is_scored_as_it_was(
    method: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_the_cpu: None
) -> None:
    """Trained on the weights of a published file, saved, loaded again and scored: equal to the last digit."""
    monkeypatch.setitem(ZOO, "tiny", FILES["swin"].row)
    file = FILES["swin"].save(tmp_path)
    overrides = [f"backbone.weights={file}", "backbone.name=tiny", "data.image_size=32", f"method.name={method}", *more]
    result = train(tmp_path / "run", *overrides)
    assert "left out of the weights' file: head (2), " in (tmp_path / "run" / "train.log").read_text()
    assert evaluate_run(str(tmp_path / "run"), "test", "last") == result["last"]["test"]

"""timm's other models that are made of EVA's blocks, and SigLIP 2: which method works on which, in tiny versions."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vpt.backbones.build import build, create
from dist_vpt.backbones.config import BackboneConfig
from dist_vpt.backbones.vit import Backbone
from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.errors import UserError
from dist_vpt.inference.attention import attend
from dist_vpt.methods import METHODS, attach
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import OptimConfig
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.attention import apply_attention
from dist_vpt.training.optim import build_optimizer, set_lr
from tests.backbones.published import FILES
from tests.methods.conftest import assert_equal_steps, config_of

MEAN, STD = (0.45, 0.5, 0.4), (0.2, 0.25, 0.3)
TINY = {"depth": 2, "embed_dim": 16, "num_heads": 2}
LABELS = torch.tensor([0, 2, 1])
# What a tiny version stands for: timm's model, and the side of its images.
MODELS = {
    "DINOv3": ("vit_small_patch16_dinov3", 32),
    "DINOv3 with biases": ("vit_small_patch16_dinov3_qkvb", 32),
    "DINOv3 with SwiGLU": ("vit_small_plus_patch16_dinov3", 32),
    "EVA": ("eva_giant_patch14_224", 28),
    "EVA-02": ("eva02_tiny_patch14_224", 28),
    "EVA-02, normed": ("eva02_base_patch14_224", 28),
    "EVA-02 CLIP": ("eva02_base_patch16_clip_224", 32),
    "EVA-02 CLIP, post-norm": ("eva02_enormous_patch14_clip_224", 28),
    "Perception Encoder, core": ("vit_pe_core_base_patch16_224", 32),
    "Perception Encoder, spatial": ("vit_pe_spatial_base_patch16_512", 32),
    "Perception Encoder, language": ("vit_pe_lang_large_patch14_448", 28),
    "RoPE-ViT": ("vit_base_patch16_rope_224", 32),
    "registers without a class token": ("vit_medium_patch16_rope_reg1_gap_256", 32),
    "SigLIP 2": ("vit_base_patch16_siglip_224", 32),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "mlp": {"name": "mlp"},
    "vqt": {"name": "vqt", "queries": 2},
    "side": {"name": "side", "layers": 2, "channels": 4},
    "combo": {"name": "combo", "width": 8, "depth": 1},
    "ladder": {"name": "ladder", "reduction": 2, "heads": 2},
    "vpt": {"name": "vpt", "prompts": 3},
    "vpt with biases": {"name": "vpt", "prompts": 3, "deep": False, "extra_trainable": ("bias",)},
    "lora": {"name": "lora", "rank": 2, "targets": ("q", "k", "v", "proj", "fc1", "fc2")},
    "adapter": {"name": "adapter", "bottleneck": 3, "style": "houlsby"},
    "adaptformer": {"name": "adaptformer", "bottleneck": 3},
    "ssf": {"name": "ssf"},
    "bias": {"name": "bias"},
    "cls": {"name": "cls"},
    "partial": {"name": "partial"},
    "full": {"name": "full"},
}
OPENS_BLOCKS = ("vqt", "lora", "adapter", "adaptformer")  # which read or extend the parts of a block
POST_NORM, NO_TOKEN = "EVA-02 CLIP, post-norm", ("registers without a class token", "SigLIP 2")
REFUSED = {
    (POST_NORM, method): "block 0 of the backbone is a EvaBlockPostNorm with EvaAttention" for method in OPENS_BLOCKS
}
REFUSED |= {(model, "cls"): "the backbone has no class token" for model in NO_TOKEN}
CASES = [(model, method) for model in MODELS for method in SETTINGS]


@pytest.fixture
def make_backbone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a tiny version of a model with random weights, all of them different from zero."""

    def make(model: str, **options: Any) -> Backbone:
        architecture, side = MODELS[model]
        row = replace(FILES["dinov3"].row, architecture=architecture, options=TINY | options, pool=None)  # type: ignore[arg-type]
        monkeypatch.setitem(ZOO, "tiny", row)
        torch.manual_seed(0)
        backbone, _ = build(BackboneConfig(name="tiny", weights="random"), image_size=side, mean=MEAN, std=STD)
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                noise = torch.randn_like(parameter) * 0.3
                parameter.copy_(1 + noise if parameter.ndim == 1 and "bias" not in name else noise)
        return backbone

    return make


def images_for(model: str) -> Tensor:
    side = MODELS[model][1]
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def loss_of(method: Method, images: Tensor) -> Tensor:
    return F.cross_entropy(method(images), LABELS)


def test_every_method_is_tried() -> None:
    # knn and logistic read features as linear does.
    assert {settings["name"] for settings in SETTINGS.values()} == set(METHODS) - {"knn", "logistic"}


@pytest.mark.parametrize("model", MODELS)
def test_features_are_timms(model: str, make_backbone: Any) -> None:
    architecture, side = MODELS[model]
    backbone, images = make_backbone(model), images_for(model)
    plain = timm.create_model(architecture, num_classes=0, img_size=side, **TINY).eval()
    state = {backbone.timm_name(name): tensor for name, tensor in backbone.state_dict().items()}
    plain.load_state_dict(state, strict=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    wanted = plain((images / 255 - mean) / std)
    found = backbone.pool(backbone(images))
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(("model", "name"), CASES)
def test_two_steps_change_all_that_is_trained_and_nothing_else(model: str, name: str, make_backbone: Any) -> None:
    backbone, images = make_backbone(model), images_for(model)
    if (model, name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model, name]):
            attach(config_of(SETTINGS[name]), backbone, 4)
        return
    method = attach(config_of(SETTINGS[name]), backbone, 4)
    before = copy.deepcopy(method.state_dict())
    steps = build_optimizer(OptimConfig(name="adamw", weight_decay=0.01), method)
    set_lr(steps, 0.01)
    for _ in range(2):
        loss_of(method.train(), images).backward()
        assert [n for n, parameter in method.trainable() if parameter.grad is None] == []
        steps.step()
        steps.zero_grad()
    trained = {n for n, _ in method.trainable()}
    changed = {key for key, tensor in method.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == trained


@pytest.mark.parametrize("policy", ["mlp", "block", "budget-0.5"])
@pytest.mark.parametrize("name", ["vpt", "lora", "adapter", "adaptformer", "ssf", "bias", "full"])
@pytest.mark.parametrize("model", ["DINOv3 with biases", "EVA-02, normed"])
def test_checkpointing_changes_nothing(model: str, name: str, policy: str, make_backbone: Any) -> None:
    images = images_for(model)
    plain, checkpointed = (_made(make_backbone(model), name) for _ in range(2))
    apply_checkpointing(checkpointed.backbone, policy)
    assert_equal_steps(plain, checkpointed, lambda method: loss_of(method, images))


def _made(backbone: Backbone, name: str, dtype: torch.dtype = torch.float32) -> Method:
    torch.manual_seed(3)
    return attach(config_of(SETTINGS[name]), backbone, 4, dtype)


@pytest.mark.parametrize("name", ["linear", "vpt", "vqt"])
@pytest.mark.parametrize("model", MODELS)
def test_attention_can_be_drawn(model: str, name: str, make_backbone: Any) -> None:
    if model == POST_NORM:
        method = _made(make_backbone(model), "linear")
        with pytest.raises(UserError, match=r"EvaBlockPostNorm .*; attention can be drawn of runs on such backbones"):
            attend(method, images_for(model))
        return
    method = _made(make_backbone(model), name).eval()
    apply_attention(method.backbone, "eager", torch.float32, writes=False, cpu=True)
    found = attend(method, images_for(model))
    shown = {"linear": 0, "vpt": 3, "vqt": 2}[name]
    assert [tuple(maps.shape) for maps in found.prompts] == [(3, 2, shown, 4)] * 2
    assert all(float(maps.sum(-1).min()) > 0 and float(maps.sum(-1).max()) < 1.001 for maps in found.class_token)


@pytest.mark.parametrize("name", ["vqt", "lora", "adapter", "adaptformer"])
def test_keys_that_heads_share_are_refused_by_the_attentions_class(name: str, make_backbone: Any) -> None:
    backbone = make_backbone("RoPE-ViT")
    backbone.blocks[1].attn.num_kv_groups = 2  # as timm from 1.0.30 on has it
    with pytest.raises(UserError, match="block 1 of the backbone is a EvaBlock with AttentionRope and keys that heads"):
        attach(config_of(SETTINGS[name]), backbone, 4)


def test_rotary_positions_that_are_weights_are_refused() -> None:
    with pytest.raises(UserError, match="has a RotaryEmbeddingMixed, whose rotary positions are weights of each block"):
        create("vit_small_patch16_rope_mixed_224", 32, **TINY)

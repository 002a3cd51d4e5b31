"""Every method against slow float64 mathematics: logits, loss and the gradient of all that is trained."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

from dist_vpt.memory import apply_checkpointing
from dist_vpt.methods import MethodRecipe, attach
from dist_vpt.methods.base import Method
from tests.methods.conftest import MEAN, STD, make_backbone, make_vit
from tests.reference import vit as reference

# One tolerance a dtype. float32: each tensor's largest error, relative to the tensor's largest number. bf16 has 8
# bits, and single biases before the softmax sum terms that cancel, so that their rounding says nothing about the
# formula (which float32 checks): there the error of all numbers together is held against all numbers together.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}
LABELS = torch.tensor([0, 2, 1])
WEIGHT = np.array([1.0, 0.5, 2.0])
DEPTH = 3

VARIANTS: dict[str, dict[str, Any]] = {
    "shallow": {"deep": False},
    "deep": {},
    "first two": {"layers": 2},
    "last two": {"layers": 2, "end": "last"},
    "last one": {"layers": 1, "end": "last"},
    "shared": {"shared": True},
    "projected": {"projection": 5},
    "img_pool": {"pooling": "img_pool"},
    "prompt_pool": {"pooling": "prompt_pool"},
    "imgprompt_pool": {"pooling": "imgprompt_pool"},
}


def reference_prompts(settings: dict[str, Any], values_nPd: np.ndarray) -> reference.Prompts:
    values = list(values_nPd)
    if not settings.get("deep", True):
        return reference.shallow(values[0])
    if settings.get("shared"):
        return reference.deep_shared(values[0], values[1], DEPTH)
    if settings.get("end") == "last":
        return reference.deep_last(values, DEPTH)
    return reference.deep_first(values)


def expected(method: Method, kind: str, images: torch.Tensor, settings: dict[str, Any] | None) -> reference.Result:
    weights = {name: tensor.double().numpy() for name, tensor in make_vit(kind).state_dict().items()}
    vit = make_vit(kind)
    config = reference.Config(
        num_heads=2, patch_size=8, mean=MEAN, std=STD, pool=vit.global_pool, no_embed_class=vit.no_embed_class
    )
    own = {name: p.detach().double().numpy() for name, p in method.named_parameters()}
    prompts = None if settings is None else reference_prompts(settings, own["prompts"])
    projection = (own["projection.weight"], own["projection.bias"]) if "projection.weight" in own else None
    return reference.forward_backward(
        weights,
        config,
        images.numpy(),
        LABELS.numpy(),
        prompts,
        head_weight=own["head.weight"],
        head_bias=own["head.bias"],
        projection=projection,
        pooling=(settings or {}).get("pooling", "original"),
        smoothing=0.1,
        example_weight=WEIGHT,
        backbone_grads=settings is None and method.trains_backbone,
    )


def actual(method: Method, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    method.train()
    logits = method(images)
    weight = torch.tensor(WEIGHT, dtype=torch.float32)
    losses = F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1)
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    return logits.detach(), loss.detach()


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    assert {name: tuple(t.shape) for name, t in found.items()} == {name: a.shape for name, a in wanted.items()}
    errors = {name: found[name].double().numpy() - wanted[name] for name in found}
    if dtype == torch.bfloat16:
        flat_error, flat = (np.concatenate([v.ravel() for v in d.values()]) for d in (errors, wanted))
        assert np.linalg.norm(flat_error) < TOLERANCE[dtype] * np.linalg.norm(flat)
        return
    for name, error in errors.items():
        scale = np.abs(wanted[name]).max()
        if name.endswith("k_norm.bias"):  # adds the same to every score: its gradient is exactly zero
            scale = np.abs(wanted[name.replace("bias", "weight")]).max()
        assert np.abs(error).max() < TOLERANCE[dtype] * scale, f"{name}: off by {np.abs(error).max() / scale:.2e}"


def make(settings: dict[str, Any], kind: str, dtype: torch.dtype = torch.float32) -> Method:
    torch.manual_seed(3)
    recipe = TypeAdapter(MethodRecipe).validate_python(settings)
    method = attach(recipe, make_backbone(kind), 4, dtype)
    with torch.no_grad():  # start away from the initialisation's tiny prompts and constant bias
        for _, parameter in method.trainable():
            if not method.trains_backbone:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return method


def check(method: Method, wanted: reference.Result, images: torch.Tensor, dtype: torch.dtype) -> None:
    """Logits, loss and all gradients; prompts are one tensor here and one a block in the reference."""
    logits, loss = actual(method, images)
    assert_close({"logits": logits}, {"logits": wanted.logits}, dtype)
    assert abs(float(loss) - wanted.loss) < TOLERANCE[dtype] * wanted.loss
    grads: dict[str, torch.Tensor] = {}
    for name, parameter in method.trainable():
        assert parameter.grad is not None, name
        if name == "prompts":
            grads |= {f"prompts.{i}": grad for i, grad in enumerate(parameter.grad)}
        else:
            grads[name.removeprefix("backbone.").removeprefix("stem.")] = parameter.grad
    assert_close(grads, wanted.grads, dtype)


@pytest.mark.parametrize("kind", ["class_token", "registers", "no_class_token", "mean_pooled"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_vpt(variant: str, kind: str, images: torch.Tensor) -> None:
    settings = {"name": "vpt", "prompts": 3, **VARIANTS[variant]}
    method = make(settings, kind)
    check(method, expected(method, kind, images, settings), images, torch.float32)


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_vpt_in_bf16(checkpointing: str, images: torch.Tensor) -> None:
    settings = {"name": "vpt", "prompts": 3}
    method = make(settings, "class_token", torch.bfloat16)
    apply_checkpointing(method.backbone, checkpointing)
    check(method, expected(method, "class_token", images, settings), images, torch.bfloat16)


@pytest.mark.parametrize("kind", ["class_token", "registers", "no_class_token", "mean_pooled"])
def test_linear(kind: str, images: torch.Tensor) -> None:
    method = make({"name": "linear"}, kind)
    check(method, expected(method, kind, images, None), images, torch.float32)


@pytest.mark.parametrize("kind", ["class_token", "registers", "no_class_token", "mean_pooled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full(kind: str, dtype: torch.dtype, images: torch.Tensor) -> None:
    method = make({"name": "full"}, kind, dtype)  # the weights stay float32; bf16 computes under autocast
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    check(method, expected(method, kind, images, None), images, dtype)

"""A run with all of it is what a plain loop of timm gives: its model, groups, optimizer, mixup, loss and average."""

from pathlib import Path

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from dist_vpt.backbones.build import timm_model
from dist_vpt.data.rand_augment import MIXING, seeded
from dist_vpt.inference.merge import timm_tensors
from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.training.components import Components, build_components
from dist_vpt.training.step import learning_rate
from tests.running import step_losses, train, words

OPTIONS = ("method.name=full", "method.head=published", "optim.scale_lr=false", "optim.lr=0.001",
           "optim.weight_decay=0", "optim.layer_decay=0.75", "optim.warmup_epochs=0.5", "train.epochs=2",
           "train.batch_size=20", "train.mixup_alpha=0.8", "train.cutmix_alpha=1", "train.label_smoothing=0.1",
           "train.model_ema_decay=0.9")  # fmt: skip
OPTIMIZERS = ("adamw", "lamb", "nadamw")


def plain_model(recipe: Recipe, method: Method, size: int, classes: int) -> nn.Module:
    """The unmodified timm model with the method's weights."""
    call = timm_model(recipe.backbone, size, classes)
    of_class = call.architecture == "VisionTransformer"
    model = VisionTransformer(**call.options) if of_class else timm.create_model(call.architecture, **call.options)
    if call.pool is not None:
        model.reset_classifier(classes, call.pool)
    model.load_state_dict(timm_tensors(method))
    return model


def timm_s_losses(recipe: Recipe, parts: Components, model: nn.Module, average: ModelEmaV3) -> list[float]:
    """The losses of timm's loop on the batches of a run; ``average`` is updated."""
    optimizer = create_optimizer_v2(model, recipe.optim.name, lr=recipe.optim.lr, weight_decay=0.0, layer_decay=0.75)
    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=len(parts.splits.classes))
    loader, losses = parts.training(0, 1), []
    mean, std = parts.method.backbone.mean, parts.method.backbone.std
    model.train()
    for epoch in range(recipe.train.epochs):
        for step, (batch,) in enumerate(loader.epoch(epoch)):
            number = epoch * loader.steps_per_epoch + step
            with seeded(recipe.seed, epoch, step, MIXING):
                images, targets = mixup((batch["images"].float() - mean) / std, batch["labels"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe.optim, recipe.train, number, loader.steps_per_epoch)
                group["lr"] *= group["lr_scale"]
            loss = SoftTargetCrossEntropy()(model(images), targets)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=number + 1)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_and_the_average_are_those_of_timm(optimizer: str, data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, *OPTIONS, f"optim.name={optimizer}")
    train(tmp_path / "run", *options)
    recipe = load_recipe([], words(tmp_path / "run", *options))
    parts = build_components(recipe)
    parts.init_method(torch.device("cpu"))
    model = plain_model(recipe, parts.method, parts.transform.image_size, len(parts.splits.classes))
    average = ModelEmaV3(model, decay=0.9)
    losses = timm_s_losses(recipe, parts, model, average)
    assert len(losses) == 10
    assert step_losses(tmp_path / "run") == pytest.approx(losses, rel=1e-3)
    restore(parts.method, read_adapters(tmp_path / "run" / "adapters.safetensors")[0], tmp_path / "run")
    expected = average.module.state_dict()
    for name, tensor in timm_tensors(parts.method).items():
        if not name.endswith("qkv.bias"):  # of keys the gradient is 0 but for rounding, which Adam's step divides by
            assert torch.allclose(tensor, expected[name], atol=2e-4), name

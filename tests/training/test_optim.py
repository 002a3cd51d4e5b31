"""The schedule and the optimizers against plain float64 formulas."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from dist_vpt.recipe.schema import OptimConfig
from dist_vpt.training.optim import build_optimizer, multiplier, set_lr
from tests.reference import optim as reference_optim
from tests.reference import schedule as reference_schedule

STEPS = 7


class Few(nn.Module):
    """A stand-in for a method: a matrix, prompts, a bias, a scale, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=draw, dtype=torch.float64))
        self.prompts = nn.Parameter(torch.randn(2, 3, 4, generator=draw, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(4, generator=draw, dtype=torch.float64))
        self.scale = nn.Parameter(torch.randn((), generator=draw, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=draw, dtype=torch.float64), requires_grad=False)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


DECAYED = {"weight", "prompts"}


@pytest.mark.parametrize(("warmup", "epochs"), [(0, 1), (0, 5), (2, 5), (0.5, 3), (4.5, 5), (10, 100)])
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_cosine_is_the_reference_at_every_step(warmup: float, epochs: int, steps: int) -> None:
    by_step = OptimConfig(warmup_epochs=warmup)
    found = [multiplier(by_step, step, steps, epochs) for step in range(epochs * steps)]
    assert found == pytest.approx(reference_schedule.per_step(warmup, epochs, steps), abs=1e-12)
    by_epoch = OptimConfig(warmup_epochs=warmup, schedule_by="epoch")
    found = [multiplier(by_epoch, step, steps, epochs) for step in range(epochs * steps)]
    expected = [value for value in reference_schedule.per_epoch(warmup, epochs) for _ in range(steps)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_shape_of_the_schedule() -> None:
    recipe = OptimConfig(warmup_epochs=2)
    values = [multiplier(recipe, step, 10, 10) for step in range(101)]
    assert values[0] == 0
    assert values[10] == 0.5
    assert values[20] == 1
    assert values[60] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0, abs=1e-12)
    assert np.all(np.diff(values[:21]) > 0)
    assert np.all(np.diff(values[20:]) < 0)


def test_constant_stays_after_its_warmup() -> None:
    recipe = OptimConfig(warmup_epochs=1, schedule="constant")
    assert [multiplier(recipe, step, 4, 3) for step in range(12)] == [0, 0.25, 0.5, 0.75, *[1.0] * 8]


def test_the_peak_is_for_a_batch_of_256() -> None:
    assert OptimConfig(lr=0.5, scale_lr=True).peak_lr(256) == 0.5
    assert OptimConfig(lr=0.5, scale_lr=True).peak_lr(64) == 0.125
    assert OptimConfig(lr=0.5).peak_lr(64) == 0.5


Settings = dict[str, object]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        {"name": "sgd", "momentum": 0.0, "weight_decay": 0.1},
        {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        {"name": "sgd", "momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
        {"name": "adam", "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
        {"name": "adam", "weight_decay": 0.0},
        {"name": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3},
        {"name": "adamw", "weight_decay": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_are_the_reference_over_several_steps(settings: Settings, fused: bool) -> None:
    recipe, method = OptimConfig(**settings), Few()  # type: ignore[arg-type]
    optimizer = build_optimizer(recipe, method, fused=fused)  # type: ignore[arg-type]
    assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)
    values = {name: p.detach().numpy().copy() for name, p in method.named_parameters()}
    states: dict[str, object] = dict.fromkeys(values)
    draw = np.random.default_rng(1)
    for number in range(STEPS):
        lr = 0.1 / (1 + number)  # every step has its own, as under a schedule
        set_lr(optimizer, lr)
        for name, parameter in method.trainable():
            gradient = np.asarray(draw.normal(size=parameter.shape))
            parameter.grad = torch.from_numpy(gradient.copy())
            decay = recipe.weight_decay if name in DECAYED else 0.0
            step = _reference_step(recipe)
            values[name], states[name] = step(values[name], gradient, states[name], lr=lr, weight_decay=decay)
        optimizer.step()
    for name, parameter in method.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), values[name], rtol=1e-12, atol=1e-12, err_msg=name)


def _reference_step(recipe: OptimConfig) -> Callable[..., tuple[np.ndarray, object]]:
    def step(value: np.ndarray, gradient: np.ndarray, state: object, **options: float) -> tuple[np.ndarray, object]:
        if recipe.name == "sgd":
            return reference_optim.sgd_step(
                value, gradient, state, momentum=recipe.momentum, nesterov=recipe.nesterov, **options
            )
        kind = {"adam": reference_optim.adam_step, "adamw": reference_optim.adamw_step}[recipe.name]
        return kind(value, gradient, state, betas=recipe.betas, eps=recipe.eps, **options)

    return step


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_only_weights_and_prompts_decay_and_what_is_frozen_is_not_there(name: str) -> None:
    method = Few()
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.3), method)  # type: ignore[arg-type]
    names = {id(p): n for n, p in method.named_parameters()}
    found = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert found == {"weight": 0.3, "prompts": 0.3, "bias": 0.0, "scale": 0.0}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_forgotten_learning_rate_changes_nothing(name: str, fused: bool) -> None:
    method = Few()
    before = {n: p.detach().clone() for n, p in method.named_parameters()}
    optimizer = build_optimizer(OptimConfig(name=name), method, fused=fused)  # type: ignore[arg-type]
    for _, parameter in method.trainable():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in method.named_parameters())


def test_set_lr_reaches_all_groups() -> None:
    optimizer = build_optimizer(OptimConfig(), Few())  # type: ignore[arg-type]
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]

"""Optimizers on flat parts of tensors, as ZeRO gives them, and on the tensors: equal numbers, or refused."""

import inspect
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from timm.optim import get_optimizer_class
from torch import Tensor, nn

from dist_vpt.errors import UserError
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS, OptimConfig
from dist_vpt.training.accelerator import unsupported_reason
from dist_vpt.training.optim import build_optimizer, set_lr
from dist_vpt.training.zero_optimizer import ELEMENTWISE, NOT_ELEMENTWISE_OPTIONS, SUPPORTED, fit_into_zero3
from tests.running import TINY

NAMES = [name for name in get_args(OptimConfig.model_fields["name"].annotation) if name not in TORCH_OPTIMIZERS]
SHAPES = ((24, 20), (3, 20), (2, 17, 18)), ((20,), (7,))  # of two groups; factored by adafactor, and too small for it
PROCESSES = 2


class Tensors:
    """What an optimizer is built over: the tensors of two groups, or the flat part that a process has of each."""

    def __init__(self, groups: list[list[Tensor]]):
        self.groups = [[nn.Parameter(tensor.clone()) for tensor in group] for group in groups]

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{i}.{j}", p) for i, group in enumerate(self.groups) for j, p in enumerate(group)]


def part(group: list[Tensor], rank: int) -> Tensor:
    """Part ``rank`` of the tensors of a group laid end to end; the last one ends with zeros."""
    flat = torch.cat([tensor.flatten() for tensor in group])
    size = -(-len(flat) // PROCESSES)
    return F.pad(flat, (0, PROCESSES * size - len(flat)))[size * rank : size * (rank + 1)]


def built(recipe: OptimConfig, tensors: Tensors) -> torch.optim.Optimizer:
    """With the weight decay of the recipe for the first group alone, also where all tensors are flat."""
    optimizer = build_optimizer(recipe, tensors)  # type: ignore[arg-type]
    optimizer.param_groups.clear()
    for group, decay in zip(tensors.groups, (0.1, 0.0), strict=True):
        optimizer.add_param_group({"params": group, "weight_decay": decay})
    return optimizer


def after_steps(recipe: OptimConfig, *, flat: bool, stage: int = 2) -> list[Tensor]:
    """All numbers of each group after six steps with gradients of many sizes."""
    draw = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> list[list[Tensor]]:
        return [[scale * torch.randn(s, generator=draw, dtype=torch.float64) for s in group] for group in SHAPES]

    start = drawn(1)
    owned = (
        [Tensors([[part(group, rank)] for group in start]) for rank in range(PROCESSES)] if flat else [Tensors(start)]
    )
    optimizers = [built(recipe, tensors) for tensors in owned]
    if flat and stage == 3:
        for optimizer, tensors in zip(optimizers, owned, strict=True):
            sharding = SimpleNamespace(optimizer=optimizer, fp32_partitioned_groups_flat=tensors.groups)
            fit_into_zero3(sharding, recipe)
    for step in range(6):
        gradients = drawn(3.0 ** (step - 2))
        for rank, (tensors, optimizer) in enumerate(zip(owned, optimizers, strict=True)):
            for group, found in zip(tensors.groups, gradients, strict=True):
                for parameter, gradient in zip(group, [part(found, rank)] if flat else found, strict=True):
                    parameter.grad = gradient.clone()
            set_lr(optimizer, 0.01 / (step + 1))
            (step_of_zero(stage, optimizer) if flat else optimizer.step())
    joined = [torch.cat([p.detach().flatten() for tensors in owned for p in tensors.groups[i]]) for i in range(2)]
    return [flat_[: sum(t.numel() for t in group)] for flat_, group in zip(joined, start, strict=True)]


def step_of_zero(stage: int, optimizer: torch.optim.Optimizer) -> None:
    """A step of each group by itself: ZeRO 1 and 2 hide the others, ZeRO-3 empties them."""
    groups, tensors = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for number, group in enumerate(groups):
        if stage == 3:
            for other in groups:
                other["params"] = []
            group["params"] = tensors[number]
        else:
            optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups
    for group, own in zip(groups, tensors, strict=True):
        group["params"] = own


def difference(recipe: OptimConfig, stage: int = 2) -> float:
    pairs = zip(after_steps(recipe, flat=False), after_steps(recipe, flat=True, stage=stage), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_those_that_step_number_by_number_are_known(name: str) -> None:
    """In float64: flat parts of tensors come to what the tensors come to, or to something else by far."""
    recipe = OptimConfig(name=name, lr=0.01)
    if name in ELEMENTWISE:
        assert difference(recipe) < 1e-12
        assert difference(recipe, stage=3) < 1e-12
    else:
        assert difference(recipe) > 1e-6


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name in NAMES])
def test_their_options_that_need_whole_tensors_are_known(name: str) -> None:
    """Every switch that timm's optimizer has, and every number that is not set."""
    kind: Any = get_optimizer_class(name, bind_defaults=False)
    found = set()
    for key, argument in inspect.signature(kind).parameters.items():
        is_switch = isinstance(argument.default, bool)
        if (is_switch or argument.default is None) and key not in ("capturable", "differentiable", "fused", "lr"):
            recipe = OptimConfig(name=name, lr=0.01, options={key: not argument.default if is_switch else 0.5})
            found |= {key} if difference(recipe) > 1e-12 else set()
    assert found <= set(NOT_ELEMENTWISE_OPTIONS)
    assert ("caution" in found) == ("caution" in inspect.signature(kind).parameters)


def reason(strategy: str, *overrides: str) -> str:
    return unsupported_reason(load_recipe([], [*TINY, "optim.scale_lr=false", *overrides]), strategy)


def test_all_others_are_refused_under_zero() -> None:
    for strategy in ("zero1", "zero2", "zero3", "zero3_offload"):
        for name in NAMES:
            found = reason(strategy, f"optim.name={name}")
            assert bool(found) == (name not in SUPPORTED), (strategy, name)
            if found:
                assert found.startswith(f"optim.name = {name}: ")
                assert found.endswith(f"; use one of {', '.join(SUPPORTED)}, or start with the ddp strategy")
    assert "a step needs norms or means of whole tensors" in reason("zero1", "optim.name=lamb")
    assert "makes it anew without the recipe's optim.weight_decay" in reason("zero3", "optim.name=adagrad")
    found = reason("zero2", "optim.name=lion", "optim.options={caution: true}")
    assert found.startswith("optim.options.caution = True: a step needs norms or means of whole tensors")
    assert found.endswith("; leave it out, or start with the ddp strategy")
    assert not reason("zero2", "optim.name=lion", "optim.options={caution: false}")
    for strategy in ("single", "ddp", "zero0"):
        assert not any(reason(strategy, f"optim.name={name}") for name in NAMES)


def test_steps_that_zero3_takes_in_parts_are_refused_where_groups_count_them() -> None:
    parts = [torch.zeros(2) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [parts[0]]}, {"params": [parts[1]]}])
    sharding = SimpleNamespace(optimizer=optimizer, fp32_partitioned_groups_flat=parts, sub_group_size=2)
    fit_into_zero3(sharding, OptimConfig(name="lion"))
    with pytest.raises(UserError, match="sub_group_size = 2: cuts a group of parameters into several"):
        fit_into_zero3(sharding, OptimConfig(name="adan"))

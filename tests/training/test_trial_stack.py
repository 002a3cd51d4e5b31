"""Trials in stacks are updated as torch's optimizers and its gradient scale would update each alone."""

import weakref
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.optim import build_optimizer, set_lr
from dist_vpt.training.step import clip_gradients, learning_rate
from dist_vpt.training.trial_stack import BACKOFF, GROWTH, GROWTH_INTERVAL, TrialStack, stack_running
from dist_vpt.training.trial_state import INIT_SCALE, Trial
from dist_vpt.training.trials import TrialGroup

STEPS, EPOCH = 12, 4
SIZES = [(7, 5), (7, 5), (7, 5), (3, 5)]  # features and classes of each trial: the last fits into no stack of others
OPTIMIZERS = {
    "sgd": ["optim.name=sgd", "optim.momentum=0.9"],
    "sgd-plain": ["optim.name=sgd", "optim.momentum=0"],
    "sgd-nesterov": ["optim.name=sgd", "optim.momentum=0.9", "optim.nesterov=true"],
    "adam": ["optim.name=adam"],
    "adamw": ["optim.name=adamw"],
}


class Toy(nn.Module):
    """What of a reader an optimizer and a stack see."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(2, 3, features))
        self.head = nn.Linear(features, classes)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.named_parameters()

    adapter_tensors = trainable


def recipe(t: int, *words: str) -> Recipe:
    own = [f"optim.lr={(0.1, 0.01, 0.3, 0.05)[t]}", f"optim.weight_decay={(0.0, 0.01, 0.1, 0.02)[t]}"]
    common = [
        "optim.warmup_epochs=1",
        "train.epochs=3",
        "optim.scale_lr=false",
        "data.format=digits",
        "runtime.precision=fp32",
    ]
    return load_recipe([], ["method.name=linear", *common, *own, *words])


def trials(*words: str) -> list[Trial]:
    made = []
    for t, sizes in enumerate(SIZES):
        torch.manual_seed(t)
        made.append(Trial(recipe(t, *words), cast(Any, Toy(*sizes))))
    return made


def random_gradients(stacks: list[TrialStack], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for stack in stacks:
        for tensor in stack.trained.values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)


def gradients_of(stacks: list[TrialStack], trial: Trial) -> dict[str, Tensor]:
    stack = next(stack for stack in stacks if trial in stack.trials)
    t = stack.trials.index(trial)
    return {name: tensor.grad[t].clone() for name, tensor in stack.trained.items() if tensor.grad is not None}


@pytest.mark.parametrize("clip", ["null", "0.5"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_torch_s(name: str, clip: str) -> None:
    words = [*OPTIMIZERS[name], f"optim.clip_norm={clip}"]
    together, alone = trials(*words), trials(*words)
    optimizers = [build_optimizer(trial.recipe.optim, trial.reader) for trial in alone]
    stacks = stack_running(together)
    assert [len(stack.trials) for stack in stacks] == [3, 1]
    for step in range(STEPS):
        random_gradients(stacks, step)
        wanted = []
        for trial, own, optimizer in zip(together, alone, optimizers, strict=True):
            set_lr(optimizer, learning_rate(own.recipe.optim, own.recipe.train, step, EPOCH))
            for parameter_name, gradient in gradients_of(stacks, trial).items():
                own.reader.get_parameter(parameter_name).grad = gradient
            wanted.append(float(clip_gradients([list(own.reader.parameters())], own.recipe.optim.clip_norm)[0]))
            optimizer.step()
        norms = [
            stack.update(stack.rate_factor(step, EPOCH), torch.ones(len(stack.trials), dtype=torch.bool))
            for stack in stacks
        ]
        assert torch.cat(norms).tolist() == pytest.approx(wanted, rel=1e-5)
    for trial, own in zip(together, alone, strict=True):
        for (_, found), (_, right) in zip(trial.reader.trainable(), own.reader.trainable(), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
        assert float(trial.state["steps"]) == STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_what_is_not_finite_touches_nothing(name: str, spoiled: str) -> None:
    """Neither its own tensors nor those of other trials."""
    mixed, calm = stack_running(trials(*OPTIMIZERS[name])[:3]), stack_running(trials(*OPTIMIZERS[name])[:3])
    for step in range(STEPS):
        random_gradients(mixed, step)
        random_gradients(calm, step)
        finite_T = torch.ones(3, dtype=torch.bool)
        if step == 5:
            before = {key: t[1].clone() for key, t in (mixed[0].trained | mixed[0].state).items()}
            for tensor in mixed[0].trained.values():
                assert tensor.grad is not None
                tensor.grad[1] = float("nan") if spoiled == "loss" else float("inf")
            finite_T[1] = spoiled != "loss"
        norm_T = mixed[0].update(mixed[0].rate_factor(step, EPOCH), finite_T)
        calm[0].update(calm[0].rate_factor(step, EPOCH), torch.ones(3, dtype=torch.bool))
        if step == 5:
            assert not norm_T[1].isfinite()
            after = {key: t[1] for key, t in (mixed[0].trained | mixed[0].state).items()}
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    for key, tensor in mixed[0].trained.items():
        assert torch.equal(tensor[::2], calm[0].trained[key][::2])


def test_the_gradient_scale_is_torch_s() -> None:
    """Of each trial its own: halved where a gradient overflows, doubled after many steps in which none did."""
    some = trials("runtime.precision=fp16", "optim.name=adam")[:2]
    [stack] = stack_running(some)
    scalers = [GradScaler("cpu") for _ in some]
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0) for _ in some]
    assert scalers[0].get_scale() == INIT_SCALE
    assert scalers[0].get_growth_factor() == GROWTH
    assert scalers[0].get_backoff_factor() == BACKOFF
    assert scalers[0].get_growth_interval() == GROWTH_INTERVAL
    for step in range(GROWTH_INTERVAL + 5):
        overflows = [step == 3, step == 4]
        for tensor in stack.trained.values():
            tensor.grad = torch.zeros_like(tensor)
            tensor.grad[torch.tensor(overflows)] = float("inf")
        for scaler, optimizer, overflow in zip(scalers, optimizers, overflows, strict=True):
            scaler.scale(torch.zeros(()))
            optimizer.param_groups[0]["params"][0].grad = torch.tensor([float("inf") if overflow else 0.0])
            scaler.step(optimizer)
            scaler.update()
        stack.update(stack.rate_factor(step % EPOCH, EPOCH), torch.ones(2, dtype=torch.bool))
        assert stack.state["scale"].tolist() == [scaler.get_scale() for scaler in scalers]
    assert stack.state["scale"].tolist() == [INIT_SCALE, INIT_SCALE]  # halved once, then doubled once
    assert stack.state["steps"].tolist() == [GROWTH_INTERVAL + 4] * 2


def test_a_trial_that_has_ended_keeps_its_tensors() -> None:
    some = trials("optim.name=adam")[:3]
    [stack] = stack_running(some)
    some[1].diverged = "the loss is nan at step 3"
    [smaller] = stack_running(some)
    assert smaller.trials == [some[0], some[2]]
    kept = [tensor.clone() for _, tensor in some[1].reader.trainable()]
    random_gradients([smaller], 0)
    smaller.update(smaller.rate_factor(EPOCH, EPOCH), torch.ones(2, dtype=torch.bool))
    random_gradients([stack], 1)
    stack.update(stack.rate_factor(EPOCH, EPOCH), torch.ones(3, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, (_, b) in zip(kept, some[1].reader.trainable(), strict=True))
    for trial, t in ((some[0], 0), (some[2], 1)):  # what its reader holds is what is trained
        for name, tensor in trial.reader.trainable():
            assert torch.equal(tensor, smaller.trained[name][t])
            assert not torch.equal(tensor, stack.trained[name][2 * t])


class Alive(TorchDispatchMode):
    """Bytes of the storages of tensors that operators have made or read and that are not freed yet, and their peak."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[weakref.ref[Any], int] = {}
        self.watch(tensors)
        self.start = self.peak = self.bytes

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    def watch(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes.setdefault(weakref.ref(storage, lambda gone: self.sizes.pop(gone, None)), storage.nbytes())

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        self.watch([leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)])
        self.peak = max(self.peak, self.bytes)
        return made


@pytest.mark.parametrize("ended", [[2], [0, 1, 2, 3, 4], list(range(6))], ids=["one", "most", "a whole stack"])
def test_trials_that_end_cost_the_memory_of_one_tensor(ended: list[int]) -> None:
    """The old stacks' memory is freed while the new ones are made."""
    made = [Trial(recipe(0, "optim.name=adam"), cast(Any, Toy(250, 40))) for _ in range(6)]
    made.append(Trial(recipe(0, "optim.name=adam"), cast(Any, Toy(3, 5))))
    group = TrialGroup(
        recipe=made[0].recipe,
        trials=made,
        **cast(Any, dict.fromkeys(("parts", "accelerator", "train", "val", "class_weights", "stop", "state", "show"))),
    )
    first = group.restack()[0]
    one = max(tensor.nbytes for tensor in first.trained.values())
    kept = [[tensor.clone() for _, tensor in trial.reader.trainable()] for trial in made]
    first.state["exp_avg.tokens"].copy_(torch.arange(6.0).view(6, 1, 1, 1))
    alive = Alive([tensor for stack in group.stacks for tensor in (stack.trained | stack.state).values()])
    assert alive.start > 3 * one
    del first
    for t in ended:
        made[t].diverged = "the loss is nan at step 3"
    with alive:
        group.restack()
    assert one / 2 < alive.peak - alive.start <= 1.1 * one
    assert alive.bytes <= alive.start + 1000  # learning rates and decays
    assert sum(len(stack.trials) for stack in group.stacks) == 7 - len(ended)
    for t, trial in enumerate(made[:6]):
        assert trial.state["exp_avg.tokens"].unique().tolist() == [t]
        assert all(torch.equal(a, b) for a, (_, b) in zip(kept[t], trial.reader.trainable(), strict=True))
        if t in ended:
            assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in trial.state.values())

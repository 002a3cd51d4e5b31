"""How often a step waits for its device, and when: whatever reads a number from a tensor does.

Counted on a CPU, where reading costs nothing; tests/gpu counts what CUDA itself reports.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Diverged
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.linear import Linear
from dist_vpt.planning.measure import make_training, synthetic_batches
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training import accelerator as accelerator_module
from dist_vpt.training import engine, metrics, trials
from dist_vpt.training.checkpointing import States
from dist_vpt.training.inputs import resolve_inputs
from dist_vpt.training.metrics import Scores
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import TrialGroup
from dist_vpt.training.unread import UnreadStep
from tests.methods.conftest import make_backbone
from tests.running import TINY, train

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that would wait for a device."""
    seen: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **named: Any) -> Any:
            seen.append(name)
            return real(self, *args, **named)

        return read

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(name))
        yield seen


def make_group(*words: str) -> tuple[TrialGroup, Any]:
    """Three trials, and a batch for them."""
    backbone = make_backbone()
    words = ("method.name=linear", "data.format=digits", "runtime.precision=fp32", "optim.name=adam", *words)
    each = [load_recipe([], [*words, f"optim.lr={lr}"]) for lr in (0.1, 0.01, 0.001)]
    readers = [Linear(cast(Any, one.method), backbone, 4, torch.float32).train() for one in each]
    group = TrialGroup(
        recipe=each[0],
        trials=[Trial(one, reader) for one, reader in zip(each, readers, strict=True)],
        parts=cast(Any, None),
        accelerator=RankAccelerator(cpu=True),
        train=cast(Any, SimpleNamespace(steps_per_epoch=4)),
        val=None,
        class_weights=torch.ones(4),
        stop=StopSignal(),
        state=cast(Any, None),
        show=print,
    )
    batch = {
        "images": StreamOutput(torch.randn(6, backbone.width)),
        "labels": torch.arange(6) % 4,
        "weight": torch.ones(6),
        "index": torch.arange(6),
    }
    return group, batch


def test_a_step_of_all_trials_reads_once_and_after_the_next_one_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    group, batch = make_group()
    for _ in range(2):
        with counted_reads(monkeypatch) as seen:
            group.take_step([batch, batch])
        assert seen == []
    with counted_reads(monkeypatch) as seen:
        group.read_steps(but=1)
    assert seen == ["tolist"]
    assert [trial.progress.images for trial in group.trials] == [12.0] * 3
    group.read_steps()
    assert [trial.progress.images for trial in group.trials] == [24.0] * 3
    assert group.unread == []


def test_a_trial_that_diverged_takes_no_step_until_that_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its next loss is finite; it is counted up to where it diverged, and the others go on."""
    group, batch = make_group()
    group.take_step([batch])
    losses = trials.image_losses
    with monkeypatch.context() as patch:
        patch.setattr(
            trials, "image_losses", lambda *args: losses(*args) * torch.tensor([[1.0], [float("nan")], [1.0]])
        )
        before = [[p.detach().clone() for _, p in trial.reader.trainable()] for trial in group.trials]
        group.take_step([batch])
    group.read_steps(but=1)
    group.take_step([batch])
    assert len(group.running) == 3, "nothing has been read of it"
    group.read_steps(but=1)
    assert [trial.diverged for trial in group.trials] == ["", "the loss is nan at step 1", ""]
    group.take_step([batch])
    group.read_steps()
    assert [trial.progress.images for trial in group.trials] == [24.0, 6.0, 24.0]
    assert [len(stack.trials) for stack in group.stacks] == [2]
    same = [
        [torch.equal(a, p) for a, (_, p) in zip(old, trial.reader.trainable(), strict=True)]
        for old, trial in zip(before, group.trials, strict=True)
    ]
    assert same == [[False, False], [True, True], [False, False]]
    assert float(group.trials[1].state["steps"]) == 1


def set_fused(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Let optimizers use torch's fused kernels as on a GPU, or not."""
    for module in (accelerator_module, engine):
        monkeypatch.setattr(module, "steps_are_fused", lambda *_: fused)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_of_a_run_reads_once_from_the_device(
    accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_fused(monkeypatch, True)
    issuing, reading = [], []

    def counted(real: Any, reads: list[list[str]]) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            with counted_reads(monkeypatch) as seen:
                made = real(*args, **named)
            reads.append(seen)
            return made

        return call

    monkeypatch.setattr(engine, "train_step", counted(engine.train_step, issuing))
    monkeypatch.setattr(UnreadStep, "read", counted(UnreadStep.read, reading))
    more = ["optim.name=sgd", "optim.clip_norm=1", "run.log_every=2", f"train.grad_accum_steps={accumulated}"]
    train(tmp_path / "run", *more, "train.epochs=1")
    assert len(issuing) == len(reading) > 2
    assert all(seen == [] for seen in issuing)
    assert all(seen == ["tolist"] for seen in reading)


@pytest.mark.parametrize("saved", [None, 3])
def test_a_step_is_read_when_the_next_one_is_issued(
    saved: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a state is saved and at the end of an epoch, all are read: F is a step's forward, R its read."""
    calls: list[str] = []

    def noted(real: Any, text: Callable[..., str]) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            calls.append(text(*args))
            return real(*args, **named)

        return call

    monkeypatch.setattr(engine, "train_step", noted(engine.train_step, lambda t, *_: f"F{t.step}"))
    monkeypatch.setattr(UnreadStep, "read", noted(UnreadStep.read, lambda unread: f"R{unread.step}"))
    monkeypatch.setattr(States, "save", noted(States.save, lambda *_: "save"))
    monkeypatch.setattr(engine, "evaluate", noted(engine.evaluate, lambda *_: "val"))
    train(tmp_path / "run", "train.epochs=2", *([] if saved is None else [f"run.save_every={saved}"]))
    found = " ".join(calls)
    if saved is None:
        assert found.startswith("F0 F1 R0 F2 R1 F3 R2 F4 R3 R4 val save F5 F6 R5 F7 R6 F8 R7 F9 R8 R9 val save")
    else:
        assert found.startswith("F0 F1 R0 F2 R1 R2 save F3 F4 R3 R4 val F5 R5 save F6 F7 R6 F8 R7 R8 save F9 R9 val")


def tensors(t: engine.TrainState) -> list[Tensor]:
    """All that a step changes."""
    state = [value for each in t.optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in (*(p for _, p in t.method.trainable()), *state)]


OPTIMIZERS = {
    "sgd": ["optim.name=sgd", "optim.momentum=0.9"],
    "sgd-plain": ["optim.name=sgd", "optim.momentum=0"],
    "nesterov": ["optim.name=sgd", "optim.momentum=0.9", "optim.nesterov=true"],
    "adam": ["optim.name=adam"],
    "adamw": ["optim.name=adamw"],
}


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
@pytest.mark.parametrize("more", [(), ("train.grad_accum_steps=2",), ("optim.clip_norm=0.5",)], ids=str)
@pytest.mark.parametrize(("name", "fused"), [*((name, True) for name in OPTIMIZERS), ("adam", False)])
def test_what_is_not_finite_changes_nothing(  # noqa: PLR0917 (what pytest gives)
    name: str, fused: bool, more: tuple[str, ...], spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither parameters nor what the optimizer remembers, nor do the steps that are issued until it is read."""
    set_fused(monkeypatch, fused)
    words = (*TINY, *OPTIMIZERS[name], "optim.weight_decay=0.1", "train.batch_size=4", "train.epochs=5", *more)
    recipe = load_recipe([], [*words, f"run.dir={tmp_path / 'run'}"])
    inputs = resolve_inputs(recipe)
    t, batches = make_training(recipe, inputs, 10), synthetic_batches(recipe, inputs, 10)
    lines: list[int] = []
    t.monitor = cast(Any, SimpleNamespace(step=lambda number, *_, **__: lines.append(number)))
    t.progress.epoch, t.train = 1, cast(Any, SimpleNamespace(steps_per_epoch=7))  # steps 7, 8, ...
    for _ in range(3):
        start = tensors(t)
        t.take_step(batches)
        t.read_steps(but=1)
    before = tensors(t)
    assert not any(torch.equal(a, b) for a, b in zip(start, before, strict=True)), "a step changes all of them"
    with monkeypatch.context() as patch:
        if spoiled == "loss":
            losses = engine.image_losses
            patch.setattr(engine, "image_losses", lambda *args: losses(*args) * float("inf"))
        handle = t.method.head.weight.register_hook(lambda grad: grad * (1.0 if spoiled == "loss" else float("inf")))
        found = f"epoch 1.*|the {'loss' if spoiled == 'loss' else 'gradient norm'} is (inf|nan) at step 10"
        if not fused:
            with pytest.raises(Diverged, match=found):
                t.take_step(batches)
        else:
            t.take_step(batches)
        handle.remove()
    t.read_steps(but=1)
    assert lines[-1] == (10 if fused else 9)  # counted from 1: what was read before, under its own number
    if fused:
        t.take_step(batches)  # which is finite, and comes before the spoiled one is read
        with pytest.raises(Diverged, match=found):
            t.read_steps(but=1)
    for a, b in zip(before, tensors(t), strict=True):
        assert torch.equal(a, b)


def test_scoring_reads_as_often_however_many_batches_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def reads_of(batches: int) -> tuple[int, dict[str, Any]]:
        torch.manual_seed(0)
        logits, labels = torch.randn(24, 7), torch.arange(24) % 7
        counts = (torch.arange(24) < 20).float()
        scores = Scores(7, torch.device("cpu"), "val")
        with counted_reads(monkeypatch) as seen:
            for rows in torch.arange(24).chunk(batches):
                scores.update(logits[rows], labels[rows], counts[rows], rows)
            found = scores.compute()
        return len(seen), found

    few, many = reads_of(1), reads_of(12)
    assert few == many
    with monkeypatch.context() as patch:  # a large split is scored in parts
        patch.setattr(metrics, "WAITING_NUMBERS", 30)
        reads, found = reads_of(12)
    assert reads > many[0]
    assert found == pytest.approx(many[1], rel=1e-6)

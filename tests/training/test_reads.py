"""How often a step waits for its device: whatever reads a number from a tensor does.

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
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.linear import Linear
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training import engine, metrics
from dist_vpt.training.metrics import Scores
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import TrialGroup, step_trials
from tests.methods.conftest import make_backbone
from tests.running import train

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


def test_a_step_of_all_trials_reads_once_from_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = make_backbone()
    words = ["method.name=linear", "data.format=digits", "runtime.precision=fp32", "optim.name=adam"]
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
    for _ in range(2):
        with counted_reads(monkeypatch) as seen:
            step_trials(group, [cast(Any, batch), cast(Any, batch)])
        assert seen == ["tolist"]
        group.progress.step += 1
    assert [trial.progress.images for trial in group.trials] == [24.0] * 3


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_of_a_run_reads_once_from_the_device(
    accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, reads = engine.train_step, []

    def counted(*args: Any, **named: Any) -> Any:
        with counted_reads(monkeypatch) as seen:
            taken = step(*args, **named)
        reads.append(seen)
        return taken

    monkeypatch.setattr(engine, "train_step", counted)
    more = ["optim.name=sgd", "optim.clip_norm=1", "run.log_every=1000", f"train.grad_accum_steps={accumulated}"]
    train(tmp_path / "run", *more, "train.epochs=1")
    assert len(reads) > 2
    assert all(seen == ["tolist"] for seen in reads)


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

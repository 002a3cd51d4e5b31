"""The average of the weights: timm's values, what is scored and saved, resumed to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3

from dist_vpt.errors import Interrupted
from dist_vpt.experiments import run as run_module
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.planning.footprint import footprint
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.runs.state import read_state
from dist_vpt.training import engine
from dist_vpt.training.accelerator import unsupported_reason
from tests.running import TINY, metrics, train
from tests.training.test_engine import _interrupt_at

AVERAGED = ("train.model_ema_decay=0.8", "train.batch_size=25", "method.prompts=1", "optim.name=adamw",
            "optim.scale_lr=false", "optim.lr=0.01", "train.epochs=2")  # fmt: skip


@pytest.mark.parametrize("warmup", [False, True])
def test_values_are_timm_s_and_those_of_the_formula(
    warmup: bool, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelEmaV3 of the whole model beside the run, updated after each step as timm's training script does."""
    whole: list[ModelEmaV3] = []
    weights: list[dict[str, torch.Tensor]] = []
    averages: list[dict[str, torch.Tensor]] = []
    step = engine.train_step

    def beside(t: Any, fetched: Any, *, norms: bool) -> Any:
        if not whole:
            t.method.backbone.reporters.clear()  # the log cannot be copied
            whole.append(ModelEmaV3(t.method, decay=0.8, use_warmup=warmup))
        done = step(t, fetched, norms=norms)
        whole[0].update(t.method, step=len(weights) + 1)
        weights.append({name: p.detach().double().clone() for name, p in t.method.trainable()})
        averages.append({name: a.clone() for name, a in t.average.tensors.items()})
        return done

    monkeypatch.setattr(engine, "train_step", beside)
    train(tmp_path / "run", *data, *AVERAGED, f"train.model_ema_warmup={str(warmup).lower()}", "train.test=false")
    assert len(weights) == 8
    theirs = dict(whole[0].module.named_parameters())
    expected = weights[0]
    for number, after in enumerate(weights[1:], start=1):
        decay = min(0.8, 1 - (1 + number) ** (-2 / 3)) if warmup else 0.8
        expected = {name: decay * expected[name] + (1 - decay) * after[name] for name in after}
    for name, ours in averages[-1].items():
        assert torch.equal(ours, theirs[name]), name
        assert torch.allclose(ours.double(), expected[name], rtol=1e-5, atol=1e-6), name
        assert not torch.equal(ours.double(), weights[-1][name]), name


def test_it_is_scored_and_saved_and_training_goes_on_with_its_own_weights(
    data: tuple[str, ...], tmp_path: Path
) -> None:
    train(tmp_path / "plain", *data, *(word for word in AVERAGED if "ema" not in word))
    result = train(tmp_path / "run", *data, *AVERAGED)
    lines = [[line for line in metrics(tmp_path / run) if line["split"] == "train"] for run in ("plain", "run")]
    assert lines[0] == lines[1]
    _, tensors, _ = read_state(max((tmp_path / "run" / "state").glob("step-*")))
    saved = read_adapters(tmp_path / "run" / "adapters.safetensors")[0]
    plain = read_adapters(tmp_path / "plain" / "adapters.safetensors")[0]
    for name in ("prompts", "head.weight", "head.bias"):
        assert torch.equal(saved[name], tensors[f"average/{name}"])
        assert torch.equal(plain[name], tensors[f"trained/{name}"])
        assert not torch.equal(saved[name], plain[name])
    assert "model_ema_decay = 0.8: the moving average" in (tmp_path / "run" / "train.log").read_text()
    for split in ("val", "test"):
        assert evaluate_run(str(tmp_path / "run"), split, "last") == result["last"][split]
    best = evaluate_run(str(tmp_path / "run"), "test", "best")
    assert best == result["best"]["test"]


def test_interrupted_and_resumed_equals_uninterrupted(data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, *AVERAGED, "runtime.deterministic=true", "train.test=false")
    train(tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(5, patch)  # of 8: in the second epoch
        with pytest.raises(Interrupted, match="stopped at step 5"):
            train(tmp_path / "parts", *options)
    train(tmp_path / "parts", *options, "run.resume=auto")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for file in ("adapters.safetensors", "best.safetensors"):
        one, two = (read_adapters(tmp_path / run / file)[0] for run in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_stop_while_val_is_scored_saves_the_run_s_own_weights(data: tuple[str, ...], tmp_path: Path) -> None:
    """Scoring happens on the average, and whatever ends it gives the weights back."""
    options = (*data, *AVERAGED, "runtime.deterministic=true", "train.test=false")
    train(tmp_path / "whole", *options)
    evaluate = engine.evaluate

    def stopped(*args: Any, **named: Any) -> Any:
        named["stop"].requested = True
        return evaluate(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "evaluate", stopped)
        with pytest.raises(Interrupted, match="while val was scored"):
            train(tmp_path / "parts", *options)
    train(tmp_path / "parts", *options, "run.resume=auto")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_finished_training_whose_test_could_not_be_scored_scores_the_average(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path / "whole", *data, *AVERAGED)

    def fails(*_: Any) -> Any:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_score_tests", fails)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", *data, *AVERAGED)
    parts = train(tmp_path / "parts", *data, *AVERAGED, "run.resume=auto")
    assert parts["last"] == whole["last"]


def test_its_memory_is_counted() -> None:
    without, with_it = (
        footprint(load_recipe([], [*TINY, "method.name=partial", *more]), 10)
        for more in ([], ["train.model_ema_decay=0.9"])
    )
    for strategy, processes in (("ddp", 1), ("ddp", 2), ("zero1", 2), ("zero2", 4)):
        held = with_it.on(strategy, processes).held - without.on(strategy, processes).held
        assert held == without.trained


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_zero3_shards_it(strategy: str) -> None:
    without, with_it = (
        footprint(load_recipe([], [*TINY, "method.name=full", *more]), 10)
        for more in ([], ["train.model_ema_decay=0.9"])
    )
    ours, theirs = with_it.on(strategy, 4), without.on(strategy, 4)
    assert ours.held + ours.host - theirs.held - theirs.host == pytest.approx(without.trained / 4, abs=1)
    assert not unsupported_reason(load_recipe([], [*TINY, "train.model_ema_decay=0.9"]), strategy)

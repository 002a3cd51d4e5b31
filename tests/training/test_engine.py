"""One step and one run: equal however the batch is split, stopped where it must stop, resumed to the last bit."""

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.data.loaders import EvalBatches
from dist_vpt.data.waiting import raise_on_stop
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.experiments.run import run
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training import engine
from dist_vpt.training.class_weights import class_weights
from tests.running import TINY, metrics, train

ONE_BATCH = ("train.batch_size=60", "train.label_smoothing=0.1", "train.class_weights=inv", "train.epochs=2")
LEARNS = ("optim.name=adamw", "optim.lr=0.05", "train.batch_size=50")


def losses(folder: Path, split: str = "train") -> list[float]:
    return [line["loss"] for line in metrics(folder) if line["split"] == split]


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose batches are computed as they come."""
    folder = tmp_path_factory.mktemp("undivided") / "run"
    train(folder, *ONE_BATCH)
    return folder


def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    result = train(tmp_path / "run", *LEARNS, "train.epochs=4")
    folder = tmp_path / "run"
    assert losses(folder)[-1] < losses(folder)[0]
    assert result == json.loads((folder / "result.json").read_text())
    assert result["last"]["epoch"] == 4
    assert result["last"]["test"]["top1"] > 50
    assert result["parameters"]["trained"] == sum(math.prod(shape) for shape in ((10, 128), (10,), (6, 2, 128)))
    assert result["seconds"] > 0
    assert result["images_per_s"] > 0
    assert result["peak_memory_mib"] > 0
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"recipe.yaml", "run.json", "metrics.jsonl", "result.json", "adapters.safetensors", "state", "tb"}
    assert len(list((folder / "state").glob("step-*"))) == 2
    assert (folder / "adapters.safetensors").stat().st_size < 20_000
    again = train(tmp_path / "run", *LEARNS, "train.epochs=4", "run.resume=auto")
    assert again == result


@pytest.mark.parametrize(
    "change",
    [
        ("train.grad_accum_steps=2",),
        ("train.grad_accum_steps=5",),
        ("runtime.activation_checkpointing=block",),
        ("data.cache=none",),
    ],
    ids=lambda change: change[0],
)
def test_how_the_batch_is_computed_changes_no_loss(change: tuple[str, ...], undivided: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *ONE_BATCH, *change)
    for split in ("train", "val", "test"):
        assert losses(undivided, split) == pytest.approx(losses(tmp_path / "run", split), abs=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_interrupted_and_resumed_equals_uninterrupted(optimizer: str, dropout: float, tmp_path: Path) -> None:
    options = ("runtime.deterministic=true", f"optim.name={optimizer}", "optim.lr=0.1", f"method.dropout={dropout}",
               "train.epochs=3", "train.batch_size=250")  # fmt: skip
    train(tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(6, patch)  # of 12: in the middle of the second epoch
        with pytest.raises(Interrupted, match="stopped at step 6"):
            train(tmp_path / "parts", *options)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    train(tmp_path / "parts", *options, "run.resume=auto")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert _bytes(tmp_path / "whole" / "adapters.safetensors") == _bytes(tmp_path / "parts" / "adapters.safetensors")
    for name in ("last", "best"):
        results = [json.loads((tmp_path / x / "result.json").read_text())[name] for x in ("whole", "parts")]
        assert results[0] == results[1]


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run")
    with pytest.raises(UserError, match=r"another recipe.*\n  optim.lr: 0.1 -> 0.2"):
        train(tmp_path / "run", "optim.lr=0.2", "run.resume=auto")


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_at, seen = 3, []
    step = engine.train_step

    def poisoned(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        if t.step == poison_at:
            seen.append(t.method.prompts.detach().clone())
            with torch.no_grad():
                t.method.head.weight[0, 0] = float("nan")
            try:
                return step(t, *args, **kwargs)
            finally:
                seen.append(t.method.prompts.detach().clone())
        return step(t, *args, **kwargs)

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(RunFailed, match="the loss is nan at step 3"):
        train(tmp_path / "run", "train.batch_size=100")
    assert torch.equal(*seen)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["status"] == "failed"
    assert "step 3" in info["reason"]
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.undo()
    train(tmp_path / "run", "train.batch_size=100")  # nothing was saved, so that the folder may be used again


def test_gradient_clipping_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain SGD an update is lr times the gradient, and the gradient's norm is at most clip_norm."""
    updates = []
    step = engine.train_step

    def watched(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        issued = step(t, *args, **{**kwargs, "norms": True})
        done = issued.read()
        updates.append((done.gradient_norm, done.update_norm / done.lr))
        return issued

    monkeypatch.setattr(engine, "train_step", watched)
    train(
        tmp_path / "run", "optim.clip_norm=0.5", "optim.momentum=0", "optim.weight_decay=0", "optim.schedule=constant"
    )
    assert all(norm > 0.5 for norm, _ in updates)
    assert all(clipped == pytest.approx(0.5, rel=1e-3) for _, clipped in updates)


def test_early_stopping(tmp_path: Path) -> None:
    result = train(
        tmp_path / "run", "train.epochs=30", "optim.lr=1e-9", "train.early_stop.patience=2", "train.batch_size=500"
    )
    assert result["best"]["epoch"] == 1
    assert result["last"]["epoch"] == 3
    assert result["best"]["test"]["top1"] == pytest.approx(result["last"]["test"]["top1"])


def test_the_best_epoch_is_scored_with_its_own_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that gets worse after its first epoch keeps that epoch's adapters and their test score."""
    step = engine.train_step

    def spoiled(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        done = step(t, *args, **kwargs)
        if t.progress.epoch == 1:
            with torch.no_grad():
                t.method.head.weight.zero_()
        return done

    monkeypatch.setattr(engine, "train_step", spoiled)
    result = train(tmp_path / "run", *LEARNS, "train.epochs=2", "data.image_size=16")
    assert result["best"]["epoch"] == 1
    assert result["best"]["test"]["top1"] > 40 > result["last"]["test"]["top1"]
    from dist_vpt.inference.evaluate import evaluate_run

    assert evaluate_run(str(tmp_path / "run"), "test", "best") == result["best"]["test"]
    assert evaluate_run(str(tmp_path / "run"), "test", "last") == result["last"]["test"]


def test_trainval_has_no_validation_and_no_best_epoch(tmp_path: Path) -> None:
    result = train(tmp_path / "run", "data.train_on=trainval")
    assert result["best"] is None
    assert not losses(tmp_path / "run", "val")
    assert len(losses(tmp_path / "run", "test")) == 1


def test_class_weights_come_from_real_counts() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2]).numpy()
    inverse = class_weights("inv", labels, 4).double()
    assert inverse[:3] / inverse[0] == pytest.approx([1, 2, 6])
    assert float(inverse[torch.tensor(labels)].mean()) == pytest.approx(1)
    root = class_weights("inv_sqrt", labels, 4).double()
    assert root[:3] / root[0] == pytest.approx([1, math.sqrt(2), math.sqrt(6)])
    assert torch.equal(class_weights("none", labels, 3), torch.ones(3))
    assert inverse[3] == 0


def test_signals_are_handed_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    train(tmp_path / "run")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    recipe = load_recipe([], [*TINY, "runtime.precision=fp16", "runtime.device=cpu", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def _interrupt_at(number: int, patch: pytest.MonkeyPatch) -> None:
    step = engine.train_step

    def counted(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        if t.step == number - 1:
            signal.raise_signal(signal.SIGUSR1)
        return step(t, *args, **kwargs)

    patch.setattr(engine, "train_step", counted)


def _bytes(path: Path) -> dict[str, list[float]]:
    from dist_vpt.runs.adapters import read_adapters

    return {name: tensor.flatten().tolist() for name, tensor in read_adapters(path)[0].items()}


def test_a_signal_during_the_last_scoring_keeps_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = EvalBatches.__iter__

    def signaled(self: EvalBatches) -> Any:
        if len(self) == 5:  # 597 images of the test split, 128 at a time
            signal.raise_signal(signal.SIGTERM)
        return batches(self)

    monkeypatch.setattr(EvalBatches, "__iter__", signaled)
    with pytest.raises(Interrupted, match="stopped while scoring"):
        train(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(engine, "train_step", lambda *args, **kwargs: steps.append(args))
    result = train(tmp_path / "run", "run.resume=auto")
    assert not steps
    assert "test" in result["last"]


@pytest.mark.parametrize(("epoch", "waiting"), [(1, False), (2, False), (1, True)])
def test_a_signal_while_val_is_scored_is_heard_there_and_val_is_scored_again(
    epoch: int, waiting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("train.epochs=2", "train.eval_batch_size=50", "runtime.deterministic=true", "train.test=false")
    options += ("run.trackers=[]",)
    train(tmp_path / "whole", *options)
    batches, read, steps, scored = EvalBatches.__iter__, [], [], []

    def signaled(self: EvalBatches) -> Any:
        scored.append(1)
        for number, batch in enumerate(batches(self)):
            if len(scored) == epoch and number == 1:
                signal.raise_signal(signal.SIGUSR1)
                if waiting:  # for the server that has the images
                    raise_on_stop()
            read.append(number)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(EvalBatches, "__iter__", signaled)
        with pytest.raises(Interrupted, match=f"at step {5 * epoch}, while val was scored, with its state saved"):
            train(tmp_path / "run", *options)
    assert read == [*([0, 1, 2, 3] * (epoch - 1)), *([0] if waiting else [0, 1])], (
        "the rest of val was not scored first"
    )
    step = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda *args, **more: (steps.append(1), step(*args, **more))[1])
    train(tmp_path / "run", *options, "run.resume=auto")
    assert len(steps) == 10 - 5 * epoch, "no step is done again"
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    for name in ("adapters", "best"):
        assert _bytes(tmp_path / "run" / f"{name}.safetensors") == _bytes(tmp_path / "whole" / f"{name}.safetensors")
    for name in ("last", "best"):
        results = [json.loads((tmp_path / x / "result.json").read_text())[name] for x in ("whole", "run")]
        assert results[0] == results[1]


def test_missing_wandb_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandb is not installed; pip install"):
        train(tmp_path / "run", "run.trackers=[tensorboard,wandb]")
    assert not (tmp_path / "run").exists()


def test_wandb_gets_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A stand-in for the wandb package that writes down how it is called."""
    request.addfinalizer(lambda: sys.modules.pop("wandb", None))  # other tests are to miss the package
    package = tmp_path / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "calls = []\nclass Run:\n    name = 'x'\n    def log(self, values, **k): calls.append(('log', values))\n"
        "    def finish(self): calls.append(('finish',))\n    def __getattr__(self, n): return lambda *a, **k: None\n"
        "def init(**options):\n    calls.append(('init', options))\n    return Run()\n"
        "class config:\n    update = staticmethod(lambda *a, **k: None)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    train(tmp_path / "run", "run.trackers=[tensorboard,wandb]")
    import wandb

    (_, options), *rest = wandb.calls
    assert options["project"] == "dist_vpt"
    assert (options["name"], options["resume"], len(options["id"])) == ("run", "allow", 16)
    assert any("train/loss" in call[1] for call in rest if call[0] == "log")
    assert list((tmp_path / "run" / "tb").glob("events*"))


def test_the_recipe_prevails_over_the_launcher_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: tuple[str, ...]
) -> None:
    options = (*data, "train.epochs=2", "optim.clip_norm=1", "train.grad_accum_steps=2")
    train(tmp_path / "plain", *options)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.01")
    train(tmp_path / "launched", *options)
    assert metrics(tmp_path / "launched") == metrics(tmp_path / "plain")
    log = (tmp_path / "launched" / "train.log").read_text()
    for line in (
        "mixed_precision = bf16 of accelerate launch is not used: runtime.precision = fp32 of the recipe is",
        "gradient_accumulation_steps = 4 of accelerate launch is not used: train.grad_accum_steps = 2 of the recipe is",
        "gradient_clipping = 0.01 of accelerate launch is not used: optim.clip_norm = 1.0 of the recipe is",
    ):
        assert log.count(f"note: {line}") == 1
    assert "of accelerate launch" not in (tmp_path / "plain" / "train.log").read_text()

"""Runs with augmentation: they learn, resume to the last bit, and are the same however a batch is computed."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dist_vpt.errors import Interrupted, UserError
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.load import load_run
from dist_vpt.inference.predict import predict
from dist_vpt.planning.footprint import footprint
from dist_vpt.planning.measure import measure
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from tests.running import TINY, metrics, step_losses, train
from tests.training.test_engine import _interrupt_at

LEARNS = ("optim.name=adamw", "optim.lr=0.03", "optim.scale_lr=false", "train.batch_size=50", "train.epochs=3",
          "method.prompts=2")  # fmt: skip
TRICKS = {
    "mixup": ("train.mixup_alpha=0.2",),
    "cutmix": ("train.cutmix_alpha=1", "train.mixup_prob=0.5"),
    "erasing": ("data.random_erasing=0.25",),
    "rand_augment": ("data.rand_augment=rand-m3-n1",),
    "average": ("train.model_ema_decay=0.9", "train.model_ema_warmup=true"),
    "lion": ("optim.name=lion", "optim.lr=0.005"),
}
ALL = ("train.mixup_alpha=0.3", "train.cutmix_alpha=1", "data.random_erasing=0.5", "data.rand_augment=rand-m5-mstd0.5",
       "train.model_ema_decay=0.8", "optim.name=nadamw", "optim.layer_decay=0.8", "method.name=partial",
       "method.blocks=2", "optim.lr=0.001", "optim.scale_lr=false", "train.label_smoothing=0.1",
       "train.class_weights=inv", "train.epochs=2", "train.batch_size=24")  # fmt: skip


@pytest.mark.parametrize("trick", TRICKS)
def test_a_run_with_it_learns(trick: str, tmp_path: Path) -> None:
    result = train(tmp_path / "run", *LEARNS, *TRICKS[trick])
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert result["last"]["test"]["top1"] > 40


@pytest.fixture(scope="module")
def alone(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(folder, *data, *ALL, "runtime.deterministic=true")
    return folder


def test_images_are_counted_whole(alone: Path) -> None:
    """Though the shares of mixed ones, in float32, add up to a little less or more."""
    state = max((alone / "state").glob("step-*"))
    assert json.loads((state / "state.json").read_text())["images"] == 200


def test_all_together_resume_to_the_last_bit(alone: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, *ALL, "runtime.deterministic=true")
    with pytest.MonkeyPatch.context() as patch:
        _interrupt_at(7, patch)  # of 10: in the second epoch
        with pytest.raises(Interrupted, match="stopped at step 7"):
            train(tmp_path / "run", *options)
    train(tmp_path / "run", *options, "run.resume=auto")
    assert metrics(alone) == metrics(tmp_path / "run")
    one, two = (read_adapters(run / "adapters.safetensors")[0] for run in (alone, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("change", ["train.grad_accum_steps=3", "data.workers=2", "data.cache=memory"])
def test_how_the_batch_is_computed_changes_no_loss(
    change: str, alone: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    train(tmp_path / "run", *data, *ALL, change)
    assert step_losses(tmp_path / "run") == pytest.approx(step_losses(alone), abs=1e-4)
    for a, b in zip(metrics(alone), metrics(tmp_path / "run"), strict=True):
        assert b == pytest.approx(a, abs=1e-4)


@pytest.mark.distributed
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "ddp with nadamw"])
def test_two_processes_equal_one(strategy: str, alone: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    from tests.distributed.test_two_processes import forked

    options, expected = (*data, *ALL), alone
    if own_eps := strategy in ("ddp", "zero2", "zero3"):
        # Adam divides a gradient that is 0 but for rounding by its own size: with this eps it stays small.
        options, expected = (*options, "optim.name=adamw", "optim.eps=1e-5"), tmp_path / "one"
        train(expected, *options)
    forks = forked(strategy.split(maxsplit=1)[0], tmp_path / "run", *options, "train.grad_accum_steps=2")
    assert forks.finish() == [0, 0], forks.output[-3000:]
    assert step_losses(tmp_path / "run") == pytest.approx(step_losses(expected), abs=1e-4)
    for a, b in zip(metrics(expected), metrics(tmp_path / "run"), strict=True):
        assert b == pytest.approx(a, abs=1e-3)
    one, two = (read_adapters(run / "adapters.safetensors")[0] for run in (expected, tmp_path / "run"))
    for name in one:
        if own_eps:
            assert torch.allclose(one[name], two[name], atol=1e-4), name
        elif not name.endswith("qkv.bias"):  # keys' biases have such a gradient, and of other tensors a number or two
            assert (one[name] - two[name]).abs().mean() < 1e-6, name


def test_a_batch_without_whole_pairs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size 25: must be a multiple of 2 .* a pair \(mixup\); use 24 or 26"):
        train(tmp_path / "run", "train.mixup_alpha=1", "train.batch_size=25")
    assert not (tmp_path / "run").exists()


def test_the_planner_counts_augmented_images_and_measures_with_them() -> None:
    recipe = load_recipe([], [*TINY, "runtime.device=cpu", "train.batch_size=20"])
    augmented = load_recipe([], [*TINY, "runtime.device=cpu", "train.batch_size=20", "train.mixup_alpha=1"])
    more = footprint(augmented, 10).height - footprint(recipe, 10).height
    assert 0 <= more <= 3 * 20 * 3 * 8 * 8 * 4
    assert "measured: " in measure(augmented, 10)


@pytest.mark.parametrize("crops", [2, 5])
def test_logits_of_several_views_are_averaged(crops: int, data: tuple[str, ...], tmp_path: Path) -> None:
    options = (*data, "train.batch_size=50", "train.epochs=1", "data.crop_mode=crop")
    result = train(tmp_path / "run", *options, f"data.test_crops={crops}", "train.eval_batch_size=8")
    plain = train(tmp_path / "plain", *options)
    assert result["last"]["train"] == plain["last"]["train"]
    assert result["last"]["test"]["loss"] != plain["last"]["test"]["loss"]
    assert result["protocol"]["test_crops"] == crops
    assert "test_crops" not in plain["protocol"]
    assert evaluate_run(str(tmp_path / "run"), "val", "last") == pytest.approx(result["last"]["val"], abs=1e-4)
    loaded = load_run(str(tmp_path / "run"), "last")
    root = Path(next(word for word in data if word.startswith("data.root=")).removeprefix("data.root="))
    files = [root / f"{i}.png" for i in range(120, 179)]  # test
    labels = torch.tensor([int(line.split()[1]) for line in (root / "test.txt").read_text().splitlines()])
    with torch.no_grad():
        views = loaded.load_images(files)
        assert views.shape == (59, crops, 3, 8, 8)
        logits = torch.stack([loaded.method(views[:, v]) for v in range(crops)]).mean(0)
        assert torch.allclose(loaded.method(views), logits, atol=1e-4)
    expected = float(F.cross_entropy(logits.double(), labels))
    assert result["last"]["test"]["loss"] == pytest.approx(expected, abs=1e-4)
    rows = predict(str(tmp_path / "run"), [str(files[0])], top=1)
    assert rows[0]["predictions"][0]["probability"] == pytest.approx(float(logits[0].softmax(0).max()), abs=1e-4)
    later = evaluate_run(str(tmp_path / "plain"), "test", "last", [f"data.test_crops={crops}"])
    assert later["loss"] != plain["last"]["test"]["loss"]

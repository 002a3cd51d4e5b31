"""What a run shows, read back from its files."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_vpt.data.config import DataConfig
from dist_vpt.data.formats import open_splits
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.launch_env import ALONE
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import UserError
from dist_vpt.experiments import run as run_module
from dist_vpt.inference.predict import predict
from dist_vpt.planning import planner
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime.peak_memory import free_and_reset_peak, peak_memory_mib
from dist_vpt.training import build_trials
from dist_vpt.training import logger as logger_module
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.figures import confusion_figure, mistakes_figure
from dist_vpt.training.metrics import Mistake
from dist_vpt.training.trackers import hyperparameters
from tests.running import metrics, train

EPOCHS, STEPS, SIDE = 2, 5, 16  # steps of 200 images, of 16 pixels a side
NORMS = ["norm/gradient", "norm/parameter", "norm/update"]
CURVES = ["train/loss", "train/top1", "train/lr", "train/images_per_s", "train/memory_mib", *NORMS]


@pytest.fixture(scope="module")
def blank_figures() -> None:
    """Here they are drawn."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "one"
    train(path, f"train.epochs={EPOCHS}", "optim.lr=0.1", "run.log_every=2", f"data.image_size={SIDE}")
    return path


@pytest.fixture(scope="module")
def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()
    assert isinstance(found, EventAccumulator)
    return found


def series(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_metrics_has_a_line_for_each_epoch_and_split(folder: Path) -> None:
    lines = metrics(folder)
    places = [(line["epoch"], line["step"], line["split"]) for line in lines]
    assert places == [(1, 5, "train"), (1, 5, "val"), (2, 10, "train"), (2, 10, "val"), (2, 10, "test")]
    result = json.loads((folder / "result.json").read_text())
    scores = {k: v for k, v in lines[-1].items() if k not in ("epoch", "step", "split")}
    assert scores == result["last"]["test"]
    assert set(scores) == {"loss", "top1", "top5", "per_class", "f1_macro", "ece", "ece_scaled"}
    assert set(lines[0]) == {"epoch", "step", "split", "loss", "top1"}


def test_the_log_tells_the_run(folder: Path) -> None:
    text = (folder / "train.log").read_text()
    lines = text.splitlines()
    stamped = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line)]
    assert re.search(r"demo \+ vpt: [\d,]+ of [\d,]+ parameters are trained \(\d+\.\d\d %\)", stamped[0])
    assert f"digits: 1,000 images of 10 classes at {SIDE} px; 2 epochs of 5 steps of 200 images" in stamped[1]
    assert "single on 1 x cpu, fp32" in stamped[2]
    steps = re.findall(
        r"step (\d+)/10  epoch (\d)  loss \d+\.\d{4}  top1 \d+\.\d %  lr \S+  \d+\.\d images/s  \d+ MiB  "
        r"\d:\d\d:\d\d left",
        text,
    )
    assert steps == [("2", "1"), ("4", "1"), ("6", "2"), ("8", "2"), ("10", "2")]
    for line in metrics(folder):
        assert f"epoch {line['epoch']}/2  {line['split']:5}  loss {line['loss']:.4f}  " in text
    assert "done in " in text
    assert lines[-1] == str(folder / "result.json")


def test_the_terminal_shows_the_log(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", "run.log_every=5")
    shown = capfd.readouterr().out
    for line in (tmp_path / "run" / "train.log").read_text().splitlines():
        assert re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) in shown


def test_curves_of_training(events: EventAccumulator) -> None:
    for tag in CURVES:
        assert list(series(events, tag)) == [2, 4, 6, 8, 10], tag
    assert all(value > 0 for tag in CURVES for value in series(events, tag).values() if tag != "train/top1")
    lr = series(events, "train/lr")
    expected = [0.1 * 200 / 256 * 0.5 * (1 + np.cos(np.pi * step / 10)) for step in (1, 3, 5, 7, 9)]
    assert list(lr.values()) == pytest.approx(expected, rel=1e-5)


def test_curves_of_evaluation_are_the_metrics(events: EventAccumulator, folder: Path) -> None:
    for line in metrics(folder):
        for name in line.keys() - {"epoch", "step", "split"}:
            found = series(events, f"{line['split']}/epoch_{name}")
            assert found[line["step"]] == pytest.approx(line[name], rel=1e-6)


def test_the_recipe_is_in_the_event_file(events: EventAccumulator, folder: Path) -> None:
    (event,) = events.Tensors("recipe/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert text == f"```yaml\n{(folder / 'recipe.yaml').read_text()}```"
    assert yaml.safe_load(text.strip("`").removeprefix("yaml"))["train"]["epochs"] == EPOCHS


def test_hyper_parameters_are_in_the_event_file(events: EventAccumulator, folder: Path) -> None:
    plugin = events.summary_metadata
    content: Any = {tag: data for tag, data in plugin.items() if data.plugin_data.plugin_name == "hparams"}
    if not content:  # TensorBoard's writer puts them in a folder of their own
        for path in (folder / "tb").rglob("events.out.tfevents.*"):
            found = EventAccumulator(str(path)).Reload()
            content |= {t: d for t, d in found.summary_metadata.items() if d.plugin_data.plugin_name == "hparams"}
    text = b"".join(data.plugin_data.content for data in content.values())
    for name in (b"optim.lr", b"method.prompts", b"train.epochs", b"run.trackers"):
        assert name in text


def test_pictures_are_in_the_event_file(events: EventAccumulator) -> None:
    assert set(events.Tags()["images"]) == {"test/confusion", "test/mistakes"}
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.step == EPOCHS * STEPS
        assert image.encoded_image_string.startswith(b"\x89PNG")
        assert image.width > 300
        assert image.height > 100


def test_resuming_writes_no_line_twice(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with open(copy / "metrics.jsonl", "a") as file:  # of epochs after the newest state
        file.write('{"epoch": 2}\n')
    (copy / "result.json").unlink()
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"status": "interrupted"}))
    train(
        copy, f"train.epochs={EPOCHS}", "optim.lr=0.1", "run.log_every=2", f"data.image_size={SIDE}", "run.resume=auto"
    )
    assert metrics(copy) == metrics(folder)
    text = (copy / "train.log").read_text()
    assert "resumed from " in text
    assert text.startswith((folder / "train.log").read_text())


def test_no_trackers(tmp_path: Path) -> None:
    train(tmp_path / "run", "run.trackers=[]")
    assert len(metrics(tmp_path / "run")) == 3
    assert not (tmp_path / "run" / "tb").exists()


# Pieces


def test_confusion_figure_writes_counts_and_shares() -> None:
    confusion_KK = np.array([[3, 1, 0], [0, 0, 0], [0, 2, 8]])
    axes = confusion_figure(confusion_KK, ("a", "b", "c")).axes[0]
    assert {(t.get_position(), t.get_text()) for t in axes.texts} == {
        ((0, 0), "3"),
        ((1, 0), "1"),
        ((1, 2), "2"),
        ((2, 2), "8"),
    }
    assert np.allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0, 0.2, 0.8]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(("classes", "numbers", "names"), [(30, True, True), (31, False, True), (61, False, False)])
def test_large_confusion_figures_stay_readable(classes: int, numbers: bool, names: bool) -> None:
    axes = confusion_figure(np.eye(classes, dtype=int), tuple(f"class{k}" for k in range(classes))).axes[0]
    assert bool(axes.texts) == numbers
    assert any(label.get_text() == "class0" for label in axes.get_yticklabels()) == names


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (4, 4), (5, 8), (16, 16)])
def test_mistakes_figure(count: int, panels: int) -> None:
    test = open_splits(DataConfig()).test
    assert test is not None
    mistakes = [Mistake(i, int(test.labels[i]), 3, 0.5) for i in range(count)]
    view = ImageTransform(16, "bicubic")
    figure = mistakes_figure(mistakes, test, view, tuple("abcdefghij"))
    assert len(figure.axes) == panels
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == count
    for axes, mistake in zip(shown, mistakes, strict=True):
        assert axes.get_title() == f"{'abcdefghij'[mistake.label]}\nread as d (50%)"
        assert np.array_equal(axes.images[0].get_array(), view.eval(test.read(mistake.index)).permute(1, 2, 0))


def test_hparams_are_flat_and_plain() -> None:
    flat = hyperparameters(load_recipe([], ["train.early_stop={}"]))
    assert flat["optim.lr"] == 0.001
    assert flat["train.early_stop.patience"] == 10
    assert flat["optim.betas"] == "[0.9, 0.999]"
    assert flat["optim.clip_norm"] == "null"
    assert {type(value) for value in flat.values()} <= {int, float, bool, str}


def test_peak_memory_is_in_mib() -> None:
    assert 50 < peak_memory_mib() < 50_000


def test_a_gpu_s_memory_is_given_back_before_a_run_asks_whether_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch's allocator keeps of the run before counts as taken. Without a GPU: the calls alone."""
    called: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("is_available", "is_initialized"):
            patch.setattr(torch.cuda, name, lambda: True)
        for name in ("empty_cache", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda name=name: called.append(name))
        free_and_reset_peak()
    assert called == ["empty_cache", "reset_peak_memory_stats"]
    for module, overrides in ((run_module, ()), (build_trials, ("method.name=linear",))):
        asked: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(module, "free_and_reset_peak", lambda asked=asked: asked.append("given back"))
            check = planner.check_memory

            def checked(*arguments: Any, asked: list[str] = asked, check: Any = check) -> Any:
                asked.append("asked")
                return check(*arguments)

            patch.setattr(run_module, "check_memory", checked)
            if overrides:
                recipe = load_recipe([], [*overrides, "data.workers=0", f"run.dir={tmp_path / 'pass'}"])
                made = build_trials.build_trial_group(
                    [recipe],
                    make_accelerator(recipe, ALONE),
                    StopSignal(),
                    tmp_path / "pass.pt",
                    print,
                    check_memory=checked,
                )
                made.close()
            else:
                train(tmp_path / "run", "run.trackers=[]")
        assert asked == ["given back", "asked"]


def test_a_score_that_is_not_defined_is_a_dash_and_null(tmp_path: Path) -> None:
    """Two classes, and a test split with images of one of them."""
    for split, classes in (("train", "ab"), ("val", "ab"), ("test", "a")):
        for name in classes:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                value = 200 * (name == "b") + i
                Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "data" / split / name / f"{i}.png")
    own = ("data.task=mine", "data.format=image_folder", f"data.root={tmp_path / 'data'}", "train.batch_size=8")
    result = train(tmp_path / "run", *own, "train.epochs=1")
    assert result["last"]["test"]["auroc"] is None
    assert 0 <= result["last"]["val"]["auroc"] <= 100
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"test .*auroc -", log)
    assert log.count("note: auroc of test is not defined: its images are all of one class") == 1


def test_class_names_of_any_bytes_and_a_figure_that_fails_cost_a_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate((b"caf\xe9", "日本".encode(), b"$x_1$")):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/" + name))
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (80 * number + i,) * 3).save(folder / f"{i}.png")
    own = ("data.task=mine", "data.format=image_folder", f"data.root={tmp_path / 'data'}", "train.batch_size=7")
    own = (*own, "train.epochs=1", "run.trackers=[tensorboard]")
    train(tmp_path / "run", *own)
    assert "warning" not in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "splits.json").read_text()).keys() == {"val", "test"}
    rows = predict(str(tmp_path / "run"), [str(tmp_path / "data")], top=3, out=str(tmp_path / "out.csv"))
    assert {each["class"] for each in rows[0]["predictions"]} == {"caf\\xe9", "日本", "$x_1$"}
    assert "caf\\xe9/0.png" in (tmp_path / "out.csv").read_text()

    def broken(*_: Any) -> Any:
        raise ValueError("no such font")

    monkeypatch.setattr(logger_module, "confusion_figure", broken)
    result = train(tmp_path / "again", *own)
    assert "test" in result["last"]
    assert "warning: the figures of test could not be drawn (ValueError: no such font)" in capsys.readouterr().out


def test_a_tracker_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no folder for events\nand more")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", broken)
    with pytest.raises(UserError, match=r"^run\.trackers: tensorboard cannot start \(no folder for events\); fix that"):
        train(tmp_path / "r", "train.epochs=1")

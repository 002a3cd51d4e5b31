"""Runs on images with several labels: trained, resumed, swept, scored again and predicted, on one process and two."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, f1_score

from dist_vpt.cli.main import main
from dist_vpt.data.formats import open_splits
from dist_vpt.errors import Interrupted, RecipeError, UserError
from dist_vpt.experiments.probe_plan import plan_probe
from dist_vpt.experiments.run import run
from dist_vpt.experiments.sweep import sweep
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.load import load_run
from dist_vpt.inference.predict import predict
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from tests.forks import command
from tests.running import TINY, metrics, train, words
from tests.shapes_present import SHAPES, write_table

SMALL = ("data.image_size=24", "train.batch_size=20", "optim.name=adamw", "optim.lr=0.01", "optim.scale_lr=false")
LINEAR = ("method.name=linear", "method.head=standardized", "train.epochs=3")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The overrides for 100 pictures: 60 of train, 20 of val and 20 of test."""
    return (*write_table(tmp_path_factory.mktemp("shapes"), 100), *SMALL)


@pytest.fixture(scope="module")
def trained(shapes: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, *shapes, *LINEAR)
    return folder


def scored_by_hand(folder: Path, split: str, adapters: str = "last") -> dict[str, float]:
    """The scores of a run by scikit-learn, from the probabilities of all images, one by one."""
    loaded = load_run(str(folder), adapters)
    images = open_splits(loaded.recipe.data)[split]
    files = [Path(images.where(i)) for i in range(len(images))]
    probabilities_nK = torch.cat([loaded.probabilities(loaded.load_images([file])) for file in files]).double().numpy()
    assert loaded.thresholds is not None
    predicted_nK = probabilities_nK >= np.array(loaded.thresholds)
    return {
        "mAP": 100 * average_precision_score(images.labels, probabilities_nK, average="macro"),
        "f1_micro": 100 * f1_score(images.labels, predicted_nK, average="micro"),
        "f1_macro": 100 * f1_score(images.labels, predicted_nK, average="macro"),
    }


def assert_equal(one: Path, other: Path, tolerance: float) -> None:
    """The metrics of two runs are equal."""
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine.pop("split") == theirs.pop("split")
        assert mine == pytest.approx(theirs, rel=tolerance)


@pytest.mark.parametrize("adapters", ["last", "best"])
def test_scores_of_a_run_are_those_of_scikit_learn(adapters: str, trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())[adapters]
    _, facts = read_adapters(trained / ("adapters.safetensors" if adapters == "last" else "best.safetensors"))
    assert facts["thresholds"] == result["thresholds"]
    for split in ("val", "test"):
        found = {name: result[split][name] for name in ("mAP", "f1_micro", "f1_macro")}
        assert found == pytest.approx(scored_by_hand(trained, split, adapters), rel=1e-4)
        assert evaluate_run(str(trained), split, adapters) == pytest.approx(result[split], rel=1e-5)


def test_what_a_run_leaves(trained: Path) -> None:
    lines = metrics(trained)
    assert [set(line) - {"epoch", "step", "split"} for line in lines[:2]] == [
        {"loss", "label_accuracy"},
        {"loss", "mAP", "f1_micro", "f1_macro"},
    ]
    log = (trained / "train.log").read_text()
    assert "labels: 1.5" in log or "labels: 1.6" in log
    assert "label_accuracy" in log
    assert "test mAP" in log
    rows = list(csv.DictReader((trained / "per_class.csv").open()))
    result = json.loads((trained / "result.json").read_text())
    assert [row["class"] for row in rows] == list(SHAPES)
    for column, score in (("average_precision", "mAP"), ("f1", "f1_macro")):
        mean = sum(float(row[column]) for row in rows) / 4
        assert mean == pytest.approx(result["last"]["test"][score], abs=1e-3)
    best = max(line["mAP"] for line in lines if line["split"] == "val")
    assert result["best"]["val"]["mAP"] == best


def test_predict_names_all_that_reach_their_threshold(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_run(str(trained), "last")
    folder = Path(str(loaded.recipe.data.root)).parent
    found = {Path(row["image"]).name: row["predictions"] for row in predict(str(trained), [str(folder)])}
    written = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    probabilities_nK = loaded.probabilities(loaded.load_images(sorted(folder.glob("*.png"))))
    thresholds_K = torch.tensor(loaded.thresholds, dtype=torch.float64)
    for file, row in zip(sorted(folder.glob("*.png")), probabilities_nK, strict=True):
        named = {each["class"] for each in found[file.name]}
        assert named == {SHAPES[k] for k in range(4) if row[k].double() >= thresholds_K[k]}
        mine = [line for line in written if Path(line["image"]).name == file.name]
        assert [line["class"] for line in mine] == ([each["class"] for each in found[file.name]] or ["(no label)"])
        ranks = [each["probability"] for each in found[file.name]]
        assert ranks == sorted(ranks, reverse=True)
    assert {len(named) for named in found.values()} > {1, 2}
    [first] = predict(str(trained), [str(folder / "0000.png")], top=3, out=str(tmp_path / "first.json"))
    assert len(first["predictions"]) == 3
    assert json.loads((tmp_path / "first.json").read_text()) == [first]


def test_an_image_without_labels_gets_a_line_that_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (24, 24), (30, 30, 30)).save(tmp_path / "empty.png")
    [row] = predict(str(trained), [str(tmp_path / "empty.png")])
    if not row["predictions"]:  # a small set: nearly always none
        assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'empty.png'},,(no label),"


def test_micro_batches_change_no_loss(shapes: tuple[str, ...], tmp_path: Path) -> None:
    options = (*shapes, *LINEAR, "train.class_weights=inv", "train.label_smoothing=0.1")
    train(tmp_path / "whole", *options)
    train(tmp_path / "parts", *options, "train.grad_accum_steps=4", "stream.cache=none")
    assert_equal(tmp_path / "whole", tmp_path / "parts", 1e-4)


def test_interrupted_and_resumed_equals_uninterrupted(shapes: tuple[str, ...], tmp_path: Path) -> None:
    options = (*shapes, "method.name=vpt", "method.prompts=2", "train.epochs=3", "runtime.deterministic=true")
    train(tmp_path / "whole", *options)
    steps, train_step = iter(range(100)), engine.train_step

    def stop_at_5(t: Any, *rest: Any, **more: Any) -> Any:
        if next(steps) == 4:
            t.stop.requested = True
        return train_step(t, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", stop_at_5)
        with pytest.raises(Interrupted):
            train(tmp_path / "parts", *options)
    train(tmp_path / "parts", *options, "run.resume=auto")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    for name in ("adapters.safetensors", "best.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert all(torch.equal(one[key], other[key]) for key in one)
        facts = [read_adapters(tmp_path / run / name)[1] for run in ("whole", "parts")]
        assert facts[0]["thresholds"] == facts[1]["thresholds"]


def test_a_trial_of_a_sweep_is_the_run_alone(shapes: tuple[str, ...], tmp_path: Path) -> None:
    grid = "sweep={grid: {optim: {lr: [0.01, 0.001]}}, seeds: [0]}"
    content = sweep(load_recipe([], words(tmp_path / "sweep", *shapes, *LINEAR, grid)))
    assert content["metric"] == "mAP"
    alone = train(tmp_path / "alone", *shapes, *LINEAR, "train.test=false", "train.data_seed=0")
    [trial] = [each for each in content["trials"] if each["setting"]["optim.lr"] == 0.01]
    assert trial["last"]["val"] == pytest.approx(alone["last"]["val"], rel=1e-4)
    assert trial["last"]["thresholds"] == pytest.approx(alone["last"]["thresholds"], rel=1e-4)
    values = {each["setting"]["optim.lr"]: each["last"]["val"]["mAP"] for each in content["trials"]}
    assert content["chosen"]["optim.lr"] == max(values, key=lambda lr: values[lr])
    assert set(content["test"]) == {"loss", "mAP", "f1_micro", "f1_macro"}
    assert (tmp_path / "sweep" / "heatmap.png").is_file()
    seed = tmp_path / "sweep" / "seeds" / "0"  # on trainval: nothing is left to choose thresholds on
    assert "thresholds" not in read_adapters(seed / "adapters.safetensors")[1]
    again = evaluate_run(str(seed), "test", "last")
    assert again["f1_micro"] == pytest.approx(content["test"]["f1_micro"]["mean"], rel=1e-5)


def test_without_val_thresholds_are_a_half(
    shapes: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tmp_path / "run", *shapes, *LINEAR, "data.train_on=trainval")
    assert "thresholds" not in result["last"]
    assert "there is no val to choose thresholds on: a class is predicted from a prob" in capsys.readouterr().out
    found = evaluate_run(str(tmp_path / "run"), "test", "last")
    assert found == pytest.approx(result["last"]["test"], rel=1e-5)


def test_one_label_each_and_a_class_that_val_lacks_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = write_table(tmp_path / "data", 40)
    file = tmp_path / "data" / "labels.csv"
    lines = file.read_text().splitlines()
    splits = [line.rpartition(",")[2] for line in lines[1:]]
    of = [i % (3 if split == "val" else 4) for i, split in enumerate(splits)]
    rows = [",".join(str(int(k == own)) for k in range(4)) for own in of]
    images = [line.partition(",")[0] for line in lines[1:]]
    text = [lines[0], *(",".join(cells) for cells in zip(images, rows, splits, strict=True))]
    file.write_text("\n".join(text) + "\n")
    result = train(tmp_path / "run", *overrides, *SMALL, *LINEAR, "train.epochs=1")
    output = capsys.readouterr().out
    assert "note: each image has exactly one label; data.labels=single trains for that" in output
    assert "note: no image of val has frame: the threshold is 0.5 there" in output
    assert result["last"]["thresholds"][3] == 0.5


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (("method.name=knn",), "method.name = knn is fitted to one label an image; use linear or another method that"),
        (("method.name=logistic",), "method.name = logistic is fitted to one label an image"),
        (("train.sampling=balanced",), "train.sampling = balanced: draws by the one label of an image; with data.lab"),
        (("train.class_weights=inv_sqrt",), "train.class_weights = inv_sqrt: is of one label an image; with data.lab"),
    ],
)
def test_what_is_for_one_label_an_image(overrides: tuple[str, ...], error: str, shapes: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match=error):
        load_recipe([], [*TINY, *shapes, *overrides])


def test_a_probe_and_a_compression_are_for_one_label_an_image(shapes: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"probe: data.labels = multiple: knn and logistic are fitted to one label"):
        plan_probe([*shapes], [], str(tmp_path / "probe"))
    train(tmp_path / "run", *shapes, "method.name=vqt", "method.queries=1")
    assert main(["compress", str(tmp_path / "run"), "--keep", "0.5"]) == 2


def test_runs_are_not_compared_by_images_that_are_right(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(trained), str(trained)]) == 2
    assert "compare their mAP and per_class.csv" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--calibrated: no temperature is fitted with data.labels = multiple"):
        predict(str(trained), [str(trained)], calibrated=True)


def test_data_check_counts_the_images_of_each_class(
    shapes: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    [root] = [word.partition("=")[2] for word in shapes if word.startswith("data.root=")]
    assert main(["data", "check", "--storage", "table", "--root", root, "data.labels=multiple"]) == 0
    output = capsys.readouterr().out
    labels = open_splits(load_recipe([], [*shapes]).data).train.labels
    for name, count in zip(SHAPES, labels.sum(0), strict=True):
        assert any(line.split()[:2] == [name, str(count)] for line in output.splitlines())


def test_features_keep_all_labels(shapes: tuple[str, ...], tmp_path: Path) -> None:
    labels = open_splits(load_recipe([], [*shapes]).data)["val"].labels
    for kind in ("safetensors", "parquet"):
        out = tmp_path / kind
        argv = ["features", *shapes[:-4], "data.image_size=24", "--split", "val", "--out", str(out), "--format", kind]
        assert main(argv) == 0
    assert torch.equal(load_file(tmp_path / "safetensors" / "val-00000.safetensors")["labels"], torch.tensor(labels))
    import pyarrow.parquet as pq

    rows = pq.read_table(tmp_path / "parquet" / "val-00000.parquet").to_pylist()
    assert [row["class"] for row in rows] == [[SHAPES[k] for k in np.flatnonzero(own)] for own in labels]


@pytest.mark.parametrize("method", ["linear", "vqt", "combo", "bias"])
def test_plan_counts_the_memory_of_several_labels(method: str, shapes: tuple[str, ...]) -> None:
    assert main(["plan", *shapes, f"method.name={method}", "data.image_size=24"]) == 0


@pytest.mark.distributed
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_two_processes_are_one(method: str, shapes: tuple[str, ...], tmp_path: Path) -> None:
    options = (*shapes, f"method.name={method}", "train.epochs=2", "train.class_weights=inv")
    options += ("method.prompts=2",) if method == "vpt" else ()
    train(tmp_path / "one", *options)
    processes = command(["train", *words(tmp_path / "two", *options)], tmp_path / "log", "ddp")
    assert processes.finish() == [0, 0], processes.output
    assert_equal(tmp_path / "one", tmp_path / "two", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "vpt"])
def test_shapes_are_found_far_above_chance(method: str, tmp_path: Path) -> None:
    """A picture has each of four shapes or not: chance is the share of its images, about 40 %."""
    overrides = write_table(tmp_path / "data", 900)
    options = ["train.epochs=20", "train.batch_size=60", "optim.lr=0.01", "optim.name=adamw", f"method.name={method}"]
    found = run(load_recipe([], [*overrides, *options, "data.workers=0", f"run.dir={tmp_path / 'run'}"]))
    labels = open_splits(load_recipe([], [*overrides]).data)["test"].labels
    chance = 100 * labels.mean()
    assert 35 < chance < 45
    assert found["last"]["test"]["mAP"] > 85
    assert found["last"]["test"]["f1_micro"] > 75
    by_hand = scored_by_hand(tmp_path / "run", "test")
    assert {name: found["last"]["test"][name] for name in by_hand} == pytest.approx(by_hand, rel=1e-4)
    print({name: round(value, 2) for name, value in found["last"]["test"].items()}, file=sys.stderr)

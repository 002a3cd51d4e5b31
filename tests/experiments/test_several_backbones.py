"""Runs on several backbones: cached and live, stopped and resumed, swept, scored again, and ranked."""

import csv
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import main
from dist_vpt.errors import Interrupted, UserError, WeightsError
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.load import load_run
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from tests.backbones.published import FILES
from tests.running import metrics, pictures, step_losses, train, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
A = "{name: demo, image_size: 16}"
B = "{name: test_vit, weights: random, image_size: 32}"
C = "{name: test_vit, weights: random, image_size: 48}"
SEVERAL = f"backbones=[{A}, {B}]"
COMBO = ("method.name=combo", "method.width=16", "method.depth=1", "method.head=published", "optim.lr=0.02")
READERS = {
    "linear": ("method.name=linear",),
    "linear on blocks": ("method.name=linear", "method.reads=blocks"),
    "mlp": ("method.name=mlp", "method.width=8", "method.dropout=0.2"),
    "combo": (*COMBO, "method.dropout=0.1", "method.group_penalty=0.01"),
    "combo of sums": (*COMBO, "method.sum_blocks=true"),
    "knn": ("method.name=knn",),
    "logistic": ("method.name=logistic",),
}
UNEVEN = ("train.epochs=2", "train.batch_size=30", "optim.scale_lr=false")  # of 100 images: the last one is smaller


def adapters_of(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapters(folder / "adapters.safetensors")[0]


def assert_same_scores(found: dict[str, Any], wanted: dict[str, Any], tolerance: float, what: str = "") -> None:
    """Also of scores that are not defined."""
    assert {name for name in found if found[name] is None} == {name for name in wanted if wanted[name] is None}, what
    defined = [{name: value for name, value in each.items() if value is not None} for each in (found, wanted)]
    assert defined[0] == pytest.approx(defined[1], rel=tolerance), what


def assert_same_run(one: Path, other: Path, tolerance: float = 0.0) -> None:
    scores = [json.loads((folder / "result.json").read_text())["last"] for folder in (one, other)]
    for split in ("train", "val", "test"):
        assert_same_scores(scores[1][split], scores[0][split], tolerance, split)
    ours, theirs = adapters_of(one), adapters_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def folders_of(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.is_dir()}


@pytest.mark.parametrize("reader", READERS)
def test_cached_streams_equal_live_ones(
    reader: str, data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*data, *READERS[reader], *UNEVEN, SEVERAL)
    train(tmp_path / "none", *options, "stream.cache=none")
    for cache, more in (("memory", ()), ("disk", (f"stream.dir={tmp_path / 'cache'}",))):
        train(tmp_path / cache, *options, f"stream.cache={cache}", *more)
        shown = capsys.readouterr().out
        assert len(re.findall(r"(?:demo|test_vit): frozen stream: (?!live)", shown)) == 2
        assert_same_run(tmp_path / "none", tmp_path / cache, 1e-5)
    splits = 3 if reader in {"knn", "logistic"} else 2  # those that are fitted keep test too, as all is read once
    assert len(folders_of(tmp_path / "cache")) == 2 * splits  # of each backbone


def test_files_of_a_backbone_serve_runs_with_others(data: tuple[str, ...], tmp_path: Path) -> None:
    """What a run has written is read by others that have one of its backbones, at another place or alone."""
    options = (*data, *READERS["linear"], *UNEVEN, "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}")

    def written() -> dict[Path, int]:
        files = [file for folder in folders_of(tmp_path / "cache") for file in folder.rglob("*")]
        return {file: file.stat().st_mtime_ns for file in files}

    train(tmp_path / "ab", *options, f"backbones=[{A}, {B}]")
    folders, files = folders_of(tmp_path / "cache"), written()
    assert len(folders) == 4
    assert files
    train(tmp_path / "b", *options, "backbone.name=test_vit", "backbone.weights=random", "data.image_size=32")
    assert folders_of(tmp_path / "cache") == folders
    train(tmp_path / "bc", *options, f"backbones=[{B}, {C}]")
    assert len(folders_of(tmp_path / "cache") - folders) == 2  # of C alone
    after = written()
    assert {name: after[name] for name in files} == files


def test_a_file_that_cannot_be_read_is_skipped_for_all(tmp_path: Path) -> None:
    options = (*pictures(tmp_path / "data", broken=lambda i: i in {7, 30}), *READERS["linear"], "train.epochs=2")
    options = (*options, SEVERAL, "data.on_decode_error=skip", "data.check_leaks=false")
    for cache in ("none", "memory"):
        result = train(tmp_path / cache, *options, f"stream.cache={cache}")
        assert {Path(name).name for name in result["skipped_images"]} == {"7.png", "30.png"}
    assert_same_run(tmp_path / "none", tmp_path / "memory", 1e-5)
    with pytest.raises(UserError, match=r"7\.png|30\.png"):
        train(tmp_path / "fails", *options, "data.on_decode_error=fail")


@pytest.mark.parametrize("reader", ["combo", "linear"])
def test_micro_batches_equal_one_batch(reader: str, data: tuple[str, ...], tmp_path: Path) -> None:
    """The penalty counts once in a step, however many micro-batches it has."""
    options = (*data, *(COMBO if reader == "combo" else READERS[reader]), *UNEVEN, SEVERAL)
    more = ("method.group_penalty=1",) if reader == "combo" else ()
    for steps in (1, 2):
        train(tmp_path / f"{steps}", *options, *more, f"train.grad_accum_steps={steps}")
    assert step_losses(tmp_path / "2") == pytest.approx(step_losses(tmp_path / "1"), rel=1e-4)
    if more:  # and it does something
        train(tmp_path / "without", *options, "method.group_penalty=0")
        norms = [adapters_of(tmp_path / name)["projection.weight"].norm() for name in ("1", "without")]
        assert norms[0] < 0.95 * norms[1]


@pytest.mark.parametrize("reader", ["combo", "mlp"])
def test_a_stopped_run_goes_on(
    reader: str, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*data, *READERS[reader], *UNEVEN, SEVERAL, "stream.cache=memory")
    train(tmp_path / "whole", *options)
    step, seen = engine.train_step, []

    def stopped(*args: Any, **kwargs: Any) -> engine.UnreadStep:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", stopped)
        with pytest.raises(Interrupted):
            train(tmp_path / "run", *options)
    train(tmp_path / "run", *options, "run.resume=auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 1e-6)


def test_trials_with_their_own_penalties_equal_runs(data: tuple[str, ...], tmp_path: Path) -> None:
    """Three penalties in one pass, one of them none."""
    rates = (0.0, 0.1, 3.0)
    options = (*data, *COMBO, *UNEVEN, SEVERAL)
    grid = f"sweep.grid.method.group_penalty={list(rates)}"
    assert main(["sweep", *words(tmp_path / "sweep", *options, grid, "sweep.seeds=[0]")]) == 0
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(content["trials"]) == 3
    found = {trial["setting"]["method.group_penalty"]: trial["last"]["val"] for trial in content["trials"]}
    alone = {}
    for rate in rates:
        result = train(tmp_path / f"{rate}", *options, f"method.group_penalty={rate}")
        alone[rate] = result["last"]["val"]
        assert found[rate]["loss"] == pytest.approx(alone[rate]["loss"], rel=1e-5)
        assert found[rate]["top1"] == pytest.approx(alone[rate]["top1"])
    assert len({round(scores["loss"], 6) for scores in alone.values()}) == 3


# A run's adapters


@pytest.fixture(scope="module")
def folder(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    train(path, *data, *READERS["combo"], *UNEVEN, SEVERAL)
    return path


def test_eval_gives_the_runs_own_numbers(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    assert_same_scores(evaluate_run(str(folder), "test", "last"), result["last"]["test"], 1e-6)


def test_predict_shows_each_backbone_its_own_image(folder: Path, tmp_path: Path) -> None:
    files = []
    for n, shade in enumerate((10, 200)):
        Image.new("RGB", (20, 15), (shade, 90, 255 - shade)).save(tmp_path / f"{n}.png")
        files.append(tmp_path / f"{n}.png")
    loaded = load_run(str(folder), "last")
    images = loaded.load_images(files)
    assert [tuple(part.shape) for part in images.parts] == [(2, 3, 16, 16), (2, 3, 32, 32)]
    wanted = loaded.method(images).softmax(1).max(1)
    assert main(["predict", str(folder), *map(str, files), "--out", str(tmp_path / "out.csv")]) == 0
    rows = [row for row in csv.DictReader((tmp_path / "out.csv").open()) if row["rank"] == "1"]
    assert [row["image"] for row in rows] == [str(file) for file in files]
    assert [row["class"] for row in rows] == [loaded.classes[i] for i in wanted.indices]
    assert [float(row["probability"]) for row in rows] == pytest.approx(wanted.values.tolist(), abs=1e-6)


def test_adapters_of_other_backbones_are_named(folder: Path, tmp_path: Path) -> None:
    """In eval by overrides, and where a recipe was edited."""
    message = r"adapters of demo at \d+ px \+ test_vit at 32 px, and the recipe has test_vit at 32 px \+ demo at \d+ px"
    with pytest.raises(WeightsError, match=message):
        evaluate_run(str(folder), "test", "last", [f"backbones=[{B}, {A}]"])
    edited = tmp_path / "run"
    edited.mkdir()
    for file in folder.iterdir():
        if file.is_file():
            (edited / file.name).write_bytes(file.read_bytes())
    recipe = yaml.safe_load((edited / "recipe.yaml").read_text())
    recipe["backbones"].reverse()
    (edited / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(WeightsError, match=message):
        load_run(str(edited), "last")


@pytest.mark.parametrize("command", ["attention", "merge", "features"])
def test_commands_of_one_backbone_say_so(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    rest = {
        "attention": [str(folder), str(tmp_path / "a.png"), "--out", str(tmp_path / "maps")],
        "merge": [str(folder), "--out", str(tmp_path / "model.safetensors")],
        "features": [*words(tmp_path / "x", *READERS["linear"], SEVERAL), "--out", str(tmp_path / "f")],
    }[command]
    assert main([command, *rest]) == 2
    error = capsys.readouterr().err
    assert "works with one backbone, and this recipe has several (demo + test_vit)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "maps").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_plan_counts_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(tmp_path / "run", *COMBO, SEVERAL), "--measure"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "demo + test_vit" in shown
    percent = re.search(r"estimated [^(]*\(([+-][\d.]+) %\)", shown)
    assert percent is not None, shown
    assert abs(float(percent[1])) < 15


# What a run says of one of them


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("method.name=linear", f"backbones=[{A}, {{name: test_vit, weights: nowhere.pth, image_size: 32}}]"),
            r"backbones\[1\] \(test_vit\): nowhere.pth: no such weights file",
        ),
        (
            (*COMBO, SEVERAL, "method.blocks=[0, 9]"),
            r"^backbones\[0\]: method.blocks: 9: the backbone's blocks are 0 to \d; leave it out",
        ),
        (
            ("method.name=linear", f"backbones=[{B}, {{name: nonsense, weights: random}}]"),
            r"backbones\[1\] \(nonsense\): ",
        ),
        (
            ("method.name=linear", f"backbones=[{A}, {{name: test_vit, weights: random, image_size: 33}}]"),
            r"backbones\[1\] \(test_vit\): image size 33: must be a multiple of the patch size 16; use image_size=32",
        ),
    ],
    ids=["weights", "blocks", "name", "image_size"],
)
def test_a_mistake_in_one_of_them(
    settings: tuple[str, ...], message: str, data: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *data, *settings)


@pytest.fixture
def swin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny one."""
    monkeypatch.setitem(ZOO, "tiny", FILES["swin"].row)
    return f"{{name: tiny, weights: {FILES['swin'].save(tmp_path)}, image_size: 32}}"


def test_a_swin_among_them(swin: str, data: tuple[str, ...], tmp_path: Path) -> None:
    several = f"backbones=[{A}, {swin}]"
    train(tmp_path / "run", *data, *READERS["linear"], several)
    scored = json.loads((tmp_path / "run" / "result.json").read_text())["last"]["test"]
    assert_same_scores(evaluate_run(str(tmp_path / "run"), "test", "last"), scored, 1e-6)
    for method, message in (
        ("combo", r"^backbones\[1\]: method.name = combo: not on Swin"),
        ("linear on blocks", r"^backbones\[1\]: method.reads = blocks: not on Swin"),
    ):
        with pytest.raises(UserError, match=message):
            train(tmp_path / method, *data, *READERS[method], several)


# Ranking


def test_backbones_are_ranked(data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = (*data, *COMBO[1:], *UNEVEN, f"backbones=[{A}, {B}, {C}]")
    argv = ["rank-backbones", *words(tmp_path / "run", *rest)]
    argv = [word for word in argv if not word.startswith("method.prompts")]
    assert main([*argv, "--best", "2"]) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "ranking.json").read_text())
    recipe = load_recipe([str(tmp_path / "run" / "recipe.yaml")])
    assert (recipe.method.name, content["group_penalty"], recipe.train.test) == ("combo", 0.01, False)
    # Of the adapters: 6 blocks (or however many) of each, in the order of the recipe.
    weight = adapters_of(tmp_path / "run")["projection.weight"].double()
    method = load_run(str(tmp_path / "run"), "last").method
    columns = [len(member.blocks) * member.width for member in method.backbone.members]
    norms = [part.norm().item() for part in weight.split(columns, dim=1)]
    ranking = content["ranking"]
    assert [each["number"] for each in ranking] == sorted(range(3), key=lambda k: -norms[k])
    assert {each["number"]: each["norm"] for each in ranking} == pytest.approx(dict(enumerate(norms)), rel=1e-5)
    assert sum(each["share"] for each in ranking) == pytest.approx(1)
    assert content["val_top1"] == metrics(tmp_path / "run")[-1]["top1"]
    best = sorted(each["number"] for each in ranking[:2])
    assert content["best"] == [recipe.members[number].name for number in best]
    # What it prints is a recipe.
    (tmp_path / "best.yaml").write_text(shown[shown.index("backbones:\n") : shown.index(str(tmp_path / "run" / "ran"))])
    chosen = load_recipe([str(tmp_path / "best.yaml")], ["method.name=combo"])
    assert chosen.backbones == tuple(recipe.members[number] for number in best)
    # Once more: the run is there.
    assert main([*argv, "--best", "1", "run.resume=auto"]) == 0
    again = json.loads((tmp_path / "run" / "ranking.json").read_text())
    assert (again["ranking"], len(again["best"])) == (ranking, 1)


def test_the_best_one_is_printed_as_a_backbone(
    data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["rank-backbones", "combo", *words(tmp_path / "run", *data, *COMBO, *UNEVEN, SEVERAL)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "run" / "ranking.json").read_text())
    (tmp_path / "best.yaml").write_text(shown[shown.index("backbone:\n") : shown.index(str(tmp_path / "run" / "ran"))])
    chosen = load_recipe([str(tmp_path / "best.yaml")], ["method.name=combo"])
    first = content["ranking"][0]["number"]
    assert (chosen.backbone.name, chosen.data.image_size) == (("demo", 16), ("test_vit", 32))[first]
    assert chosen.backbone.weights == ("pretrained", "random")[first]


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            ["method.name=combo"],
            "rank-backbones: the recipe has one backbone; name several: backbones=[dinov2_s14, demo]",
        ),
        (["linear", SEVERAL], "rank-backbones: method.name = linear: backbones are ranked by combo's projection"),
        (["combo", SEVERAL, "method.group_penalty=0"], "method.group_penalty = 0: is what ranks them; leave it out"),
        (["combo", SEVERAL, "--best", "2"], "--best 2: must be at least 1 and below the number of backbones, 2"),
        (["combo", SEVERAL, "--best", "0"], "--best 0: must be at least 1 and below the number of backbones, 2"),
    ],
)
def test_what_cannot_be_ranked(
    rest: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rank-backbones", "data.task=digits", *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_probe_is_of_one_backbone_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "data.task=digits", SEVERAL, "--backbones", "demo", "--out", str(tmp_path / "out")]) == 2
    assert "error: probe: backbones: each is probed alone" in capsys.readouterr().err
    file = tmp_path / "two.yaml"
    file.write_text("data: {task: digits}\nbackbones: [demo, {name: demo, image_size: 32}]\n")
    assert main(["probe", str(file), "--backbones", "demo", "--out", str(tmp_path / "out")]) == 2
    assert "error: probe: backbones: each is probed alone" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""knn and logistic from the command line, `dist-vpt probe` and `dist-vpt features`: the demo backbone on few digits."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dist_vpt.cli.main import main
from dist_vpt.inference import features as features_module
from dist_vpt.inference.features import compute
from dist_vpt.methods.fitted import FittedReader
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.components import build_components
from tests.running import finish, pictures, start

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SMALL = ["data.image_size=24", "data.workers=0", "train.epochs=2"]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize(
    "settings", [["method.name=knn", "method.k=5"], ["method.name=logistic"]], ids=["knn", "logistic"]
)
def test_a_run_is_scored_evaluated_and_predicts_alike(
    settings: list[str], data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", *data, *SMALL, *settings, f"run.dir={run}"]
    assert main(words) == 0
    assert "done in" in capsys.readouterr().out
    scores = result(run)["last"]
    assert {"train", "val", "test"} < scores.keys()
    assert scores["test"]["top1"] > 60
    assert main([*words, "run.resume=auto"]) == 0
    assert "done already" in capsys.readouterr().out
    assert main(["eval", str(run)]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if "top1" in line)
    assert shown.count(f"{scores['test']['top1']:.4f}") == 2
    recipe = load_recipe([run / "recipe.yaml"])
    test = build_components(recipe, trains=False).splits["test"]
    files = [test.where(i) for i in range(len(test))]
    assert main(["predict", str(run), *files, "--top", "1", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    right = [each["predictions"][0]["class"] == str(test.labels[i]) for i, each in enumerate(found)]
    assert 100 * sum(right) / len(right) == pytest.approx(scores["test"]["top1"], abs=1e-3)


@pytest.mark.parametrize("grid", ["k: [1, 5]", "c: [0.01, 1.0]"])
def test_a_trial_of_a_sweep_is_what_it_is_alone(grid: str, data: tuple[str, ...], tmp_path: Path) -> None:
    key = grid[0]
    name = {"k": "knn", "c": "logistic"}[key]
    common = [*data, *SMALL, f"method.name={name}", "protocol=default"]
    values = grid.split(": ")[1]
    sweep = tmp_path / "sweep"
    words = ["sweep", *common, f"sweep.grid={{method: {{{key}: {values}}}}}", "sweep.seeds=[0]", f"run.dir={sweep}"]
    assert main(words) == 0
    table = json.loads((sweep / "sweep.json").read_text())
    assert len(table["trials"]) == 2
    trial = table["trials"][1]
    setting = f"method.{key}={trial['setting'][f'method.{key}']}"
    assert main(["train", *common, setting, "train.test=false", f"run.dir={tmp_path / 'alone'}"]) == 0
    alone = result(tmp_path / "alone")["last"]
    for split in ("train", "val"):
        assert alone[split]["top1"] == pytest.approx(trial["last"][split]["top1"])
        assert alone[split]["loss"] == pytest.approx(trial["last"][split]["loss"], rel=1e-3)
    assert (sweep / "seeds" / "0" / "adapters.safetensors").is_file()


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings", [["method.name=knn", "method.k=5"], ["method.name=logistic"]], ids=["knn", "logistic"]
)
def test_two_processes_are_as_one(settings: list[str], data: tuple[str, ...], tmp_path: Path) -> None:
    words = [*data, *settings, "data.image_size=24", "runtime.device=cpu"]
    process = start("ddp", tmp_path / "two", *words)
    output = finish(process)
    assert process.returncode == 0, output[-2000:]
    one = start("ddp", tmp_path / "two", *words, "run.resume=auto")  # of a finished run
    assert "done already" in finish(one)
    from tests.running import words as with_defaults

    assert main(["train", *with_defaults(tmp_path / "one", *words)]) == 0
    two, one_result = result(tmp_path / "two"), result(tmp_path / "one")
    assert two["processes"] == 2
    for split in ("train", "val", "test"):
        assert two["last"][split]["top1"] == pytest.approx(one_result["last"][split]["top1"], abs=1e-3)
        assert two["last"][split]["loss"] == pytest.approx(one_result["last"][split]["loss"], rel=1e-3)


def test_a_probe_ranks_backbones_and_names_those_that_fail(
    data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, random = tmp_path / "missing.yaml", tmp_path / "random.yaml"
    missing.write_text("backbone: {name: vit_small_patch8_224, weights: nowhere.safetensors}\n")
    random.write_text("backbone: {name: demo, weights: random}\n")
    out = tmp_path / "probe"
    words = ["probe", *data, *SMALL, "--backbones", f"{random},demo,{missing}", "--out", str(out)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "missing: failed: " in shown
    rows = list(csv.DictReader((out / "probe.csv").open()))
    assert [row["backbone"] for row in rows] == ["demo"] * 3 + ["random"] * 3 + ["missing"]
    assert [row["method"] for row in rows] == ["knn", "logistic", "linear"] * 2 + [""]
    assert rows[0]["rank"] == "1"
    assert "nowhere.safetensors" in rows[-1]["failed"]
    assert json.loads((out / "probe.json").read_text())["rows"][0]["width"] == int(rows[0]["width"])
    assert len(list((out / "streams").glob("test-*/stream.json"))) == 2  # once for all methods of a backbone
    assert main(words) == 0  # everything is done
    assert list(csv.DictReader((out / "probe.csv").open())) == rows
    assert main([*words, "data.max_megapixels=9"]) == 2
    assert "holds a probe of other data or settings; name a new folder" in capsys.readouterr().err
    assert main(["probe", *data, *SMALL, "--backbones", str(missing), "--out", str(tmp_path / "none")]) == 3
    assert "none of 1 backbones could be used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backbones", "dinov2_s41"], "--backbones dinov2_s41: neither the name of a backbone's recipe nor a .yaml "),
        (["--backbones", "dinov2_s41"], "did you mean 'dinov2_s14'?"),
        (["--backbones", "own.yaml"], "--backbones own.yaml: there is no such file"),
        (["--backbones", "demo,demo"], "--backbones: demo is the name of two of them; give each once"),
        (["vpt_deep"], "probe: vpt_deep sets a method, and a probe runs knn, logistic, linear; leave it out"),
        (["dinov2_s14"], "probe: dinov2_s14 is a backbone; name it in --backbones"),
        (["method.k=3"], "probe: method.k=3: differs between its runs and is set by it; leave it out"),
        (["--backbones", "demo", "--out", "full"], "--out full: holds files (a) but no probe; name a new folder"),
    ],
)
def test_a_probes_mistakes(  # noqa: PLR0917 (pytest's fixtures)
    words: list[str],
    message: str,
    data: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    assert main(["probe", *data, *SMALL, *words]) == 2
    assert message in capsys.readouterr().err


def test_mistakes_of_fitted_methods(data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *data, *SMALL, "method.name=knn", "method.k=101", f"run.dir={tmp_path / 'a'}"]) == 2
    assert "method.k = 101: there are 100 images to train on" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["knn", "logistic"])
def test_features_that_are_not_finite_are_refused(
    method: str,
    data: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FittedReader, "stream_features", lambda _, stream: stream.pooled.float() / 0.0)
    assert main(["train", *data, *SMALL, f"method.name={method}", f"run.dir={tmp_path / 'a'}"]) == 2
    assert f"method.name = {method}: features of training images are not finite" in capsys.readouterr().err


# Features


@pytest.mark.parametrize("what", ["pooled", "blocks", "tokens"])
@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_features_are_what_the_backbone_computes(
    what: str, format: str, data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "SHARD_BYTES", 1)  # a file for each batch
    out = tmp_path / "features"
    words = [*data, *SMALL, "train.eval_batch_size=30"]
    assert main(["features", *words, "--what", what, "--format", format, "--split", "test", "--out", str(out)]) == 0
    about = json.loads((out / "features.json").read_text())
    assert [file["images"] for file in about["files"]] == [30, 29]
    assert sorted(path.name for path in out.iterdir()) == ["features.json", *(file["file"] for file in about["files"])]
    parts = build_components(load_recipe([], [*words, "method.name=linear"]), trains=False)
    split, backbone = parts.splits["test"], parts.method.backbone
    images = torch.cat([batch["images"] for batch in parts.evaluation("test", 0, 1)])
    expected = compute(backbone, images, what)  # type: ignore[arg-type]
    own = {"pooled": backbone.pool(backbone(images)), "tokens": backbone(images)}.get(what)
    if own is not None:
        torch.testing.assert_close(expected, own)
    else:
        torch.testing.assert_close(expected[:, -1], backbone.pool(backbone(images)))
        assert expected.shape[1] == len(backbone.blocks)
    found, labels, paths = [], [], []
    for file in about["files"]:
        if format == "safetensors":
            with safe_open(out / file["file"], "pt") as opened:
                found.append(opened.get_tensor("features"))
                labels += opened.get_tensor("labels").tolist()
                paths += json.loads(opened.metadata()["paths"])
                assert json.loads(opened.metadata()["dist_vpt"])["weights_sha256"] == about["weights_sha256"]
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(out / file["file"])
            found.append(torch.tensor(table["features"].to_pylist()).view(-1, *file["shape"]))
            labels += table["label"].to_pylist()
            paths += table["path"].to_pylist()
            assert table["class"].to_pylist() == [about["classes"][label] for label in table["label"].to_pylist()]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)
    assert labels == split.labels.tolist()
    assert paths == [split.where(i) for i in range(len(split))]


def test_mistakes_of_features(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["features", *data, *SMALL, "--format", "parquet", "--out", str(out)]) == 2
    assert "--format parquet: needs pyarrow, which is not installed (pip install 'dist-vpt[parquet]')" in (
        capsys.readouterr().err
    )
    out.mkdir(exist_ok=True)
    (out / "a").touch()
    assert main(["features", *data, *SMALL, "--out", str(out)]) == 2
    assert f"--out {out}: holds files (a); name a new or an empty folder" in capsys.readouterr().err


def test_unreadable_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = pictures(tmp_path / "pictures", broken=lambda i: i == 7)
    common = [*words, "data.image_size=24", "data.workers=0", "data.on_decode_error=skip"]
    assert main(["train", *common, "method.name=knn", "method.k=3", f"run.dir={tmp_path / 'run'}"]) == 0
    assert len(result(tmp_path / "run")["skipped_images"]) <= 1
    assert main(["features", *common, "--out", str(tmp_path / "features")]) == 0
    files = json.loads((tmp_path / "features" / "features.json").read_text())["files"]
    assert sum(file["images"] for file in files) == 59
    assert "1 unreadable images skipped" in capsys.readouterr().out

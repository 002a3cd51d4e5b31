"""A VQT run on fewer features: which are kept, what heads on them compute, and that the backbone is asked once.

B images of a batch, n of a split, F features, K classes.
"""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from timm.models.vision_transformer import Block

from dist_vpt.cli.main import main
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, RunFolderError, UserError, WeightsError
from dist_vpt.experiments import compress as module
from dist_vpt.experiments import compress_training, fixed_features
from dist_vpt.experiments.compress import compress
from dist_vpt.experiments.fixed_features import best_features, group_lasso, head_loss
from dist_vpt.frozen_stream.observe import compute_stream
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.predict import predict
from dist_vpt.methods import attach
from dist_vpt.methods.config_readers import VQTConfig
from dist_vpt.methods.vqt import VQT
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.adapters import collect, read_adapters, restore, write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.components import Components, build_components
from tests.methods.conftest import make_backbone
from tests.running import train, words

FEATURES = 128 * 3  # the demo backbone's width, of its own features and of two blocks with a query each
RUN = (
    "method.name=vqt",
    "method.blocks=[1,4]",
    "method.dropout=0.1",
    "optim.name=adam",
    "optim.lr=0.05",
    "train.epochs=2",
    "train.label_smoothing=0.1",
    "run.trackers=[]",
)
TRAINED = {"queries", "head.weight", "head.bias"}
MEASURED = {"token_scale", "feature_norm.mean", "feature_norm.std"}


@pytest.fixture(scope="module")
def source(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQT run of two epochs."""
    path = tmp_path_factory.mktemp("runs") / "vqt"
    train(path, *RUN, *data)
    return path


@pytest.fixture(scope="module")
def linear(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "linear"
    train(path, "method.name=linear", "run.trackers=[]", *data)
    return path


@pytest.fixture(scope="module")
def selected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run compressed to two fractions, and the curve."""
    out = tmp_path_factory.mktemp("selected")
    return out, again(source, ["0.5", "0.1"], out=str(out))


def again(run: Path, *words: Any, **options: Any) -> dict[str, Any]:
    """A compression in this process, which knows of no accelerator yet."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    return compress(str(run), *words, **options)


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapters(folder / "adapters.safetensors")[0]


def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def loaded(folder: Path) -> tuple[VQT, Any]:
    """A run's method with its adapters, and its splits."""
    parts = build_components(RunFolder(folder).load())
    assert isinstance(parts.method, VQT)
    restore(parts.method, adapters(folder), folder)
    parts.method.eval()
    return parts.method, parts


def make_vqt(**settings: Any) -> VQT:
    torch.manual_seed(0)
    method = attach(VQTConfig(**settings), make_backbone(), 5)
    assert isinstance(method, VQT)
    return method


# The loss, the choice


def reference_loss(  # noqa: PLR0917 (as head_loss)
    features_BF: np.ndarray,
    weight_KF: np.ndarray,
    bias_K: np.ndarray,
    labels_B: np.ndarray,
    weights_B: np.ndarray,
    smoothing: float,
    lasso: float,
) -> tuple[float, np.ndarray]:
    """Cross-entropy against smoothed targets plus the group lasso, and the gradient to W, written out."""
    logits_BK = features_BF @ weight_KF.T + bias_K
    exps_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    p_BK = exps_BK / exps_BK.sum(1, keepdims=True)
    targets_BK = np.eye(len(bias_K))[labels_B] * (1 - smoothing) + smoothing / len(bias_K)
    share_B = weights_B / weights_B.sum()
    norms_F = np.sqrt((weight_KF**2).sum(0))
    loss = -(share_B[:, None] * targets_BK * np.log(p_BK)).sum() + lasso * norms_F.sum()
    gradient = ((p_BK - targets_BK) * share_B[:, None]).T @ features_BF
    gradient += lasso * np.divide(weight_KF, norms_F, out=np.zeros_like(weight_KF), where=norms_F > 0)
    return float(loss), gradient


@pytest.mark.parametrize("lasso", [0.0, 1e-4, 0.3])
def test_the_loss_and_its_gradient_equal_the_formula(lasso: float) -> None:
    rng = np.random.default_rng(0)
    features_BF, weight_KF, bias_K = rng.normal(size=(6, 9)), rng.normal(size=(4, 9)), rng.normal(size=4)
    weight_KF[:, 3] = 0  # a norm without a slope
    labels_B, weights_B = np.array([0, 3, 1, 1, 2, 0]), np.array([1, 0.5, 2, 1, 0, 1])
    wanted, gradient = reference_loss(features_BF, weight_KF, bias_K, labels_B, weights_B, 0.1, lasso)
    weight = torch.from_numpy(weight_KF).requires_grad_()
    logits_BK = torch.from_numpy(features_BF) @ weight.T + torch.from_numpy(bias_K)
    loss = head_loss(logits_BK, torch.from_numpy(labels_B), torch.from_numpy(weights_B), 0.1, weight, lasso)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), gradient, rtol=1e-11, atol=1e-13)


def test_the_group_lasso_adds_the_norms_of_columns() -> None:
    weight_KF = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    assert float(group_lasso(weight_KF)) == 6.0


def test_the_features_with_the_largest_norms_are_kept() -> None:
    weight_KF = np.random.default_rng(1).normal(size=(7, 50))
    by_norm = sorted(range(50), key=lambda f: -math.sqrt(sum(w * w for w in weight_KF[:, f])))
    for number in (1, 20, 50):
        kept = best_features(torch.from_numpy(weight_KF), number)
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(by_norm[:number])
    assert best_features(torch.ones(3, 6), 2).tolist() == [0, 1]


# What is written


def test_each_fraction_is_a_run_folder(source: Path, selected: tuple[Path, dict[str, Any]]) -> None:
    out, _ = selected
    for share, features in (("0.5", FEATURES // 2), ("0.1", round(FEATURES / 10))):
        folder = out / f"featselect-{share}"
        assert status(folder) == "done"
        recipe = RunFolder(folder).load()
        assert isinstance(recipe.method, VQTConfig)
        assert recipe.method.keep == features
        assert recipe.run.dir == str(folder)
        tensors = adapters(folder)
        assert tensors.keys() == TRAINED | {"kept"}
        assert tensors["kept"].dtype == torch.int64
        assert tensors["kept"].shape == (features,)
        assert tensors["head.weight"].shape == (10, features)
        assert torch.equal(tensors["queries"], adapters(source)["queries"])
        found = result(folder)
        assert found["compression"]["features"] == features
        assert found["compression"]["bytes"] == (folder / "adapters.safetensors").stat().st_size
        assert found["compression"]["bytes"] < (source / "adapters.safetensors").stat().st_size
        assert found["parameters"]["trained"] == sum(tensors[name].numel() for name in TRAINED)
        assert set(found["last"]) == {"epoch", "train", "val", "temperature", "test"}
        assert not list(folder.glob("*.tmp"))
    half, tenth = (adapters(out / f"featselect-{share}")["kept"].tolist() for share in ("0.5", "0.1"))
    assert set(tenth) < set(half)


def test_the_curve(source: Path, selected: tuple[Path, dict[str, Any]]) -> None:
    out, curve = selected
    assert json.loads((out / "featselect-curve.json").read_text()) == curve
    assert (out / "featselect-curve.png").read_bytes().startswith(b"\x89PNG")
    assert curve["uncompressed"]["top1"] == pytest.approx(result(source)["last"]["test"]["top1"], abs=1e-4)
    assert curve["uncompressed"]["features"] == FEATURES
    assert [point["keep"] for point in curve["points"]] == [0.5, 0.1]
    for point in curve["points"]:
        assert point["top1"] == result(out / f"featselect-{point['keep']}")["last"]["test"]["top1"]


@pytest.mark.parametrize("kept", ["last", "best"])
def test_eval_gives_the_reported_numbers(kept: str, selected: tuple[Path, dict[str, Any]]) -> None:
    folder = selected[0] / "featselect-0.5"
    reported = result(folder)[kept]["val"]
    assert evaluate_run(str(folder), "val", kept) == pytest.approx(reported, abs=1e-5)
    assert "test" not in result(folder)["best"]  # also where the best epoch is the last one
    if kept == "last":
        reported = result(folder)["last"]["test"]
        assert evaluate_run(str(folder), "test", kept) == pytest.approx(reported, abs=1e-5)


def test_a_smaller_head_is_the_head_on_the_kept_columns(source: Path, selected: tuple[Path, dict[str, Any]]) -> None:
    whole, parts = loaded(source)
    small, _ = loaded(selected[0] / "featselect-0.1")
    batches = parts.evaluation("test", 0, 1)
    batch = next(iter(batches))
    with torch.no_grad():
        features_BF = whole.features(compute_stream(whole.backbone, batch["images"], whole.spec)).double().numpy()
        logits_BK = small(batch["images"]).numpy()
    own = {name: tensor.double().numpy() for name, tensor in adapters(selected[0] / "featselect-0.1").items()}
    columns = own["kept"].astype(int)
    assert features_BF.shape == (59, FEATURES)
    np.testing.assert_allclose(logits_BK, features_BF[:, columns] @ own["head.weight"].T + own["head.bias"], atol=1e-5)


def test_predict_reads_it(selected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "out.csv"
    (row,) = predict(str(selected[0] / "featselect-0.1"), [str(tmp_path / "a.png")], top=10, out=str(out))
    assert sum(p["probability"] for p in row["predictions"]) == pytest.approx(1, abs=1e-4)
    assert len(list(csv.DictReader(out.open(newline="")))) == 10


def test_the_default_place_and_the_table(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(source, tmp_path / "run"))
    assert main(["compress", str(run), "--keep", "0.25", "train.epochs=1"]) == 0
    assert sorted(p.name for p in (run / "compressed").iterdir()) == [
        "featselect-0.25",
        "featselect-curve.json",
        "featselect-curve.png",
    ]
    assert RunFolder(run / "compressed" / "featselect-0.25").load().train.epochs == 1
    shown = capsys.readouterr().out
    assert "uncompressed" in shown
    assert "0.25" in shown


# The modes


@pytest.mark.parametrize("mode", ["compress", "featselect"])
def test_the_backbone_is_asked_once_for_every_image(
    mode: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, when_trained = 0, []
    forward, trained = Block.forward, compress_training.train_head

    def counted(block: Block, tokens_BND: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        nonlocal images
        images += len(tokens_BND)
        return forward(block, tokens_BND, *rest, **more)

    def train_head(*words: Any) -> Any:
        when_trained.append(images)
        return trained(*words)

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(compress_training, "train_head", train_head)
    again(source, [0.5, 0.2], mode, out=str(tmp_path))
    assert images == 6 * (100 + 20 + 59)
    assert set(when_trained) == {images}
    assert len(when_trained) == (1 if mode == "compress" else 3)


def test_compress_cuts_the_head_of_the_group_lasso(source: Path, tmp_path: Path) -> None:
    again(source, [1.0, 0.3], "compress", lasso=0.01, out=str(tmp_path))
    whole, cut = (adapters(tmp_path / f"compress-{share}") for share in ("1.0", "0.3"))
    norms_F = np.sqrt((whole["head.weight"].double().numpy() ** 2).sum(0))
    kept = sorted(sorted(range(FEATURES), key=lambda f: -norms_F[f])[: round(0.3 * FEATURES)])
    assert cut["kept"].tolist() == kept
    assert torch.equal(cut["head.weight"], whole["head.weight"][:, kept])
    assert torch.equal(cut["head.bias"], whole["head.bias"])
    assert not torch.equal(whole["head.weight"], adapters(source)["head.weight"])
    again(source, [0.3], "featselect", lasso=0.01, out=str(tmp_path))
    assert adapters(tmp_path / "featselect-0.3")["kept"].tolist() == kept
    reported = result(tmp_path / "compress-0.3")["last"]
    assert evaluate_run(str(tmp_path / "compress-0.3"), "test", "last") == pytest.approx(reported["test"], abs=1e-5)


def test_a_stronger_lasso_makes_norms_smaller(source: Path, tmp_path: Path) -> None:
    sums = []
    for lasso in (0.0, 0.03):
        again(source, [1], "compress", lasso=lasso, out=str(tmp_path / str(lasso)))
        sums.append(float(group_lasso(adapters(tmp_path / str(lasso) / "compress-1.0")["head.weight"])))
    assert sums[1] < sums[0]


def test_all_features_may_be_kept(source: Path, tmp_path: Path) -> None:
    curve = again(source, [1.0], out=str(tmp_path))
    assert adapters(tmp_path / "featselect-1.0")["kept"].tolist() == list(range(FEATURES))
    assert curve["points"][0]["features"] == FEATURES


def test_one_feature_at_least_is_kept(source: Path, tmp_path: Path) -> None:
    again(source, [1e-5], "compress", out=str(tmp_path))
    assert adapters(tmp_path / "compress-1e-05")["kept"].shape == (1,)


def test_finetune_changes_queries_and_head_and_nothing_else(
    source: Path, selected: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[list[dict[str, torch.Tensor]]] = []
    fit = compress_training.fit_trials

    def snapshot(p: Any) -> None:
        states.append([{n: t.clone() for n, t in trial.reader.state_dict().items()} for trial in p.trials])

    def fit_trials(p: Any) -> None:
        snapshot(p)
        fit(p)
        snapshot(p)

    monkeypatch.setattr(compress_training, "fit_trials", fit_trials)
    again(source, [0.5, 0.1], "finetune", out=str(tmp_path))
    for before, after, share in zip(*states, ("0.5", "0.1"), strict=True):
        assert {name for name in before if not torch.equal(before[name], after[name])} == TRAINED
        started, ended = adapters(selected[0] / f"featselect-{share}"), adapters(tmp_path / f"finetune-{share}")
        assert started.keys() == ended.keys()
        assert all(torch.equal(before[name], started[name]) for name in started)
        assert all(torch.equal(after[name], ended[name]) for name in ended)
        reported = result(tmp_path / f"finetune-{share}")["last"]["test"]
        assert evaluate_run(str(tmp_path / f"finetune-{share}"), "test", "last") == pytest.approx(reported, abs=1e-3)
    assert not list(tmp_path.glob(".finetune*"))


def test_a_head_is_trained_as_the_engine_trains_one(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first features are the backbone's own; a head on these alone is linear probing."""
    words = (
        *data,
        *("train.epochs=3", "train.batch_size=13", "train.label_smoothing=0.1", "train.class_weights=inv", "seed=5"),
        *("optim.lr=2", "optim.weight_decay=0.1", "optim.warmup_epochs=1", "optim.clip_norm=0.5", "run.trackers=[]"),
    )
    train(tmp_path / "linear", "method.name=linear", *words)
    train(tmp_path / "vqt", "method.name=vqt", "method.blocks=[5]", "method.normalize=false", *words)
    monkeypatch.setattr(compress_training, "best_features", lambda _, number: torch.arange(number))
    again(tmp_path / "vqt", [0.5])
    wanted, found = adapters(tmp_path / "linear"), adapters(tmp_path / "vqt" / "compressed" / "featselect-0.5")
    for name in ("head.weight", "head.bias"):
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5), name
    reported = result(tmp_path / "linear")["last"]
    last = result(tmp_path / "vqt" / "compressed" / "featselect-0.5")["last"]
    assert last["epoch"] == reported["epoch"]
    for split in ("train", "val", "test"):
        assert last[split] == pytest.approx(reported[split], abs=1e-3), split


def test_micro_batches_change_nothing(source: Path, selected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    again(source, [0.1], out=str(tmp_path), overrides=["train.grad_accum_steps=4"])
    wanted, found = adapters(selected[0] / "featselect-0.1"), adapters(tmp_path / "featselect-0.1")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_val_there_is_no_best_epoch(source: Path, tmp_path: Path) -> None:
    again(source, [0.2], out=str(tmp_path), overrides=["data.train_on=trainval"])
    assert result(tmp_path / "featselect-0.2")["best"] is None
    assert not (tmp_path / "featselect-0.2" / "best.safetensors").exists()
    assert set(result(tmp_path / "featselect-0.2")["last"]) == {"epoch", "train", "temperature", "test"}


def test_early_stopping_is_obeyed(source: Path, tmp_path: Path) -> None:
    words = ["train.epochs=9", "optim.lr=1e-9", "train.early_stop={patience: 2, min_delta: 0}"]
    again(source, [0.2], out=str(tmp_path), overrides=words)
    assert result(tmp_path / "featselect-0.2")["last"]["epoch"] == 3


def test_without_a_test_split_val_is_scored(source: Path, tmp_path: Path) -> None:
    curve = again(source, [0.2], out=str(tmp_path), overrides=["train.test=false"])
    assert curve["split"] == "val"
    assert curve["points"][0]["top1"] == result(tmp_path / "featselect-0.2")["last"]["val"]["top1"]
    assert "test" not in result(tmp_path / "featselect-0.2")["last"]


# Resuming


def test_what_is_there_is_not_trained_again(
    source: Path, selected: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, curve = selected
    monkeypatch.setattr(compress_training, "train_head", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(module, "fix_features", lambda *_: pytest.fail("computed"))
    assert again(source, [0.1], out=str(out), overrides=["data.workers=1"]) == curve, "with the fractions made before"


def test_what_is_half_there_is_made_anew(source: Path, selected: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = Path(shutil.copytree(selected[0], tmp_path / "out"))
    info = json.loads((out / "featselect-0.5" / "run.json").read_text())
    (out / "featselect-0.5" / "run.json").write_text(json.dumps(info | {"status": "running"}))
    (out / "featselect-0.5" / "result.json").unlink()
    before = (out / "featselect-0.1" / "adapters.safetensors").stat().st_mtime_ns
    again(source, [0.5, 0.1], out=str(out))
    assert (out / "featselect-0.1" / "adapters.safetensors").stat().st_mtime_ns == before
    wanted, found = adapters(selected[0] / "featselect-0.5"), adapters(out / "featselect-0.5")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (out / "featselect-0.1" / "adapters.safetensors").unlink()
    with pytest.raises(RunFolderError, match=r"adapters.safetensors is missing; remove this folder"):
        again(source, [0.1], out=str(out))


def test_another_compression_is_not_overwritten(source: Path, selected: tuple[Path, dict[str, Any]]) -> None:
    out = selected[0]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(RunFolderError, match=r"lasso: 0.0001 -> 0.5"):
        again(source, [0.1], out=str(out), lasso=0.5)
    with pytest.raises(RunFolderError, match=r"optim.lr: 0.05 -> 0.2"):
        again(source, [0.1], out=str(out), overrides=["optim.lr=0.2"])
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_stopped_finetuning_resumes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again(source, [0.2], "finetune", out=str(tmp_path / "whole"))
    fit = compress_training.fit_trials

    def stopped(p: Any) -> None:
        p.stop.requested = True
        fit(p)

    with monkeypatch.context() as patch:
        patch.setattr(compress_training, "fit_trials", stopped)
        with pytest.raises(Interrupted):
            again(source, [0.2], "finetune", out=str(tmp_path / "run"))
    folder = tmp_path / "run" / "finetune-0.2"
    assert status(folder) == "interrupted"
    assert not (folder / "adapters.safetensors").exists()
    again(source, [0.2], "finetune", out=str(tmp_path / "run"))
    wanted, found = adapters(tmp_path / "whole" / "finetune-0.2"), adapters(folder)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("at", ["features", "a head"])
def test_what_is_stopped_before_a_fraction_is_done_resumes(
    at: str, source: Path, selected: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"features": "compute_stream", "a head": "head_loss"}[at]
    called = getattr(fixed_features, name)

    def stopped(*words: Any) -> Any:
        StopSignal.entered[-1].requested = True
        return called(*words)

    with monkeypatch.context() as patch:
        patch.setattr(fixed_features, name, stopped)
        with pytest.raises(Interrupted, match="compress: stopped; the same command resumes"):
            again(source, [0.5], out=str(tmp_path))
    assert status(tmp_path / "featselect-0.5") == "interrupted"
    again(source, [0.5], out=str(tmp_path))
    wanted, found = adapters(selected[0] / "featselect-0.5"), adapters(tmp_path / "featselect-0.5")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_full_disk_loses_nothing_that_was_finetuned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, fit, epochs = compress_training.write_adapters, compress_training.fit_trials, []

    def full(path: Path, *words: Any) -> None:
        if "finetune-0.2" in str(path):
            raise OSError(28, "No space left on device")
        write(path, *words)

    def counted(p: Any) -> None:
        before = p.epoch
        fit(p)
        epochs.append(p.epoch - before)

    again(source, [0.9], "finetune", out=str(tmp_path))  # made before
    monkeypatch.setattr(compress_training, "fit_trials", counted)
    with monkeypatch.context() as patch:
        patch.setattr(compress_training, "write_adapters", full)
        with pytest.raises(RunFailed, match=r"finetune-0.2: the results cannot be written .* the same command resumes"):
            again(source, [0.9, 0.5, 0.2], "finetune", out=str(tmp_path))
    assert (status(tmp_path / "finetune-0.5"), status(tmp_path / "finetune-0.2")) == ("done", "failed")
    before = (tmp_path / "finetune-0.5" / "adapters.safetensors").stat().st_mtime_ns
    [state] = tmp_path.glob(".finetune*")
    (tmp_path / f".{state.name}.123.tmp").write_text("what a killed write has left")
    curve = again(source, [0.9, 0.5, 0.2], "finetune", out=str(tmp_path))
    assert epochs == [2, 0]  # trained once
    assert [point["keep"] for point in curve["points"]] == [0.9, 0.5, 0.2]
    assert (tmp_path / "finetune-0.5" / "adapters.safetensors").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*finetune*"))


def test_a_loss_that_is_not_finite(source: Path, tmp_path: Path) -> None:
    words = ["optim.name=sgd", "optim.scale_lr=false", "optim.lr=1e38"]
    with pytest.raises(RunFailed, match=r"lower optim\.lr"):
        again(source, [0.2], out=str(tmp_path), overrides=words)
    assert status(tmp_path / "featselect-0.2") == "failed"
    again(source, [0.2], out=str(tmp_path))  # a run that left nothing is no hindrance
    assert status(tmp_path / "featselect-0.2") == "done"


def test_a_fraction_that_diverges_takes_no_other_with_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit_trials(p: Any) -> None:
        for trial in p.trials:
            trial.progress.last = {"epoch": 1}
        p.trials[1].diverged = "the loss was nan at step 3"

    monkeypatch.setattr(compress_training, "fit_trials", fit_trials)
    with pytest.raises(RunFailed, match=r"finetune-0.2: the loss was nan at step 3; choose another --out"):
        again(source, [0.2, 0.5], "finetune", out=str(tmp_path))
    assert (status(tmp_path / "finetune-0.5"), status(tmp_path / "finetune-0.2")) == ("done", "failed")


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "--keep 0: must be shares of the features, above 0 and at most 1"),
        (["--keep", "0.5", "1.5", "-1", "nan", "half"], "--keep 1.5 -1 nan half: must be shares"),
        (["--keep", "0.5", "--lasso", "-1"], "--lasso -1.0: must be a number from 0 on"),
        (["--keep", "0.5", "--lasso", "nan"], "--lasso nan: must be"),
        (["--keep", "0.5", "optim.lrr=1"], "optim.lrr = 1: unknown key; did you mean 'lr'?"),
        (["--keep", "0.5", "method.keep=3"], "method.keep = 3: is compressed already"),
        (["--keep", "0.5", "method.queries=2"], "queries has shape (2, 1, 128), this recipe's (2, 2, 128)"),
        (["--keep", "0.5", "method.name=linear"], "only a vqt run has features to choose among"),
        (["--keep", "0.5", "train.test=false", "data.train_on=trainval"], "nothing is left to score"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(
    words: list[str], message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_another_methods_run(linear: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["method.name=vqt"]):
        assert main(["compress", str(linear), "--keep", "0.5", *more]) == 2
        assert "method.name = linear: only a vqt run has features to choose among" in capsys.readouterr().err
    assert not (linear / "compressed").exists()


def test_a_compressed_run(selected: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(
        UserError, match=r"method.keep = 192: is compressed already; name the run that it was made from"
    ):
        again(selected[0] / "featselect-0.5", [0.5])


def test_no_run_and_no_adapters(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        again(tmp_path, [0.5])
    shutil.copy(source / "recipe.yaml", tmp_path)
    with pytest.raises(WeightsError, match="no adapters here"):
        again(tmp_path, [0.5])
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_other_classes(source: Path, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val", "test"):
        for name in "abc":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    words = ["data.task=mine", "data.format=image_folder", f"data.root={tmp_path}"]
    with pytest.raises(UserError, match="other classes"):
        again(source, [0.5], out=str(tmp_path / "out"), overrides=words)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_elses(source: Path, tmp_path: Path) -> None:
    (tmp_path / "featselect-0.5").mkdir()
    (tmp_path / "featselect-0.5" / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds files \(thesis.tex\) but no run"):
        again(source, [0.5], out=str(tmp_path))
    assert [p.name for p in (tmp_path / "featselect-0.5").iterdir()] == ["thesis.tex"]


def test_several_processes_are_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="works on one process"):
        compress(str(source), [0.5])


def test_features_that_memory_does_not_hold(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_features, "BUDGET", 0)
    with pytest.raises(UserError, match=r"the features take 0.00 GiB and 0.00 GiB of memory may be used"):
        again(source, [0.5], out=str(tmp_path))


# The index beside the trained tensors


def test_adapters_hold_the_index(tmp_path: Path) -> None:
    method = make_vqt(keep=3)
    assert method.kept is not None
    method.kept.copy_(torch.tensor([1, 20, 63]))
    tensors = collect(method)
    assert tensors["kept"].dtype == torch.int64
    assert tensors.keys() == TRAINED | MEASURED | {"kept"}
    assert collect(make_vqt()).keys() == TRAINED | MEASURED
    assert {name for name, _ in method.trainable()} == TRAINED
    write_adapters(tmp_path / "a.safetensors", tensors, {})
    other = make_vqt(keep=3)
    restore(other, read_adapters(tmp_path / "a.safetensors")[0], tmp_path)
    assert other.kept is not None
    assert other.kept.tolist() == [1, 20, 63]
    for changed, message in (
        ({"kept": torch.tensor([1, 20])}, r"kept has shape \(2,\), this recipe's \(3,\)"),
        ({"kept": torch.tensor([1.0, 20.0, 63.0])}, r"kept is torch.float32, this recipe's torch.int64"),
    ):
        with pytest.raises(WeightsError, match=message):
            restore(other, tensors | changed, tmp_path)
    with pytest.raises(WeightsError, match=r"missing: \['kept'\]"):
        restore(other, collect(make_vqt()), tmp_path)
    with pytest.raises(WeightsError, match=r"unexpected: \['kept'\]"):
        restore(make_vqt(), tensors, tmp_path)


@pytest.mark.parametrize("kept", [None, [5, 4, 6], [1, 1, 2], [-1, 0, 1], [0, 1, 64]], ids=str)
def test_an_index_that_names_no_features_is_rejected_before_it_is_used(kept: list[int] | None) -> None:
    method = make_vqt(keep=3)
    if kept is not None:
        assert method.kept is not None
        method.kept.copy_(torch.tensor(kept))
    for mode in (True, False):
        with pytest.raises(UserError, match="adapters must list the kept features, increasing numbers below 64"):
            method.train(mode)


def test_a_recipe_that_keeps_features_cannot_be_trained_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Components, "use_cached_stream", lambda *_: pytest.fail("computed"))
    with pytest.raises(UserError, match=r"method.keep = 7: adapters must list the kept features"):
        train(tmp_path / "run", *RUN, "method.keep=7")
    assert not (tmp_path / "run").exists()
    assert main(["sweep", *words(tmp_path / "sweep", *RUN, "method.keep=7")]) == 2
    assert "method.keep = 7: adapters must list the kept features" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_file_where_compressions_should_go(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["compress", str(source), "--keep", "0.5", "--out", str(tmp_path / "file" / "x")]) == 2
    assert f"{tmp_path / 'file'} is a file; name a folder" in capsys.readouterr().err


def test_more_features_than_there_are() -> None:
    with pytest.raises(UserError, match=r"method.keep = 65: there are 64 features"):
        make_vqt(keep=65)
    assert load_recipe([], ["method.name=vqt"]).method.keep is None  # type: ignore[union-attr]


def test_padding_of_a_batch_is_no_image_of_the_cache() -> None:
    """Compiled blocks get batches of one size; the padding has index -1, which would be the last image."""
    method = attach(VQTConfig(), make_backbone(), 4, torch.float32)
    assert isinstance(method, VQT)
    images = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Batches(list[dict[str, torch.Tensor]]):
        skipped = frozenset[str]()

        def close(self) -> None: ...

    def batches(*rows: list[int]) -> Any:
        return Batches(
            {
                "images": torch.stack([images[n] if n >= 0 else torch.zeros_like(images[0]) for n in row]),
                "index": torch.tensor(row),
                "weight": (torch.tensor(row) >= 0).float(),
            }
            for row in rows
        )

    split: Any = type("Three", (), {"__len__": lambda self: 3, "labels": np.arange(3)})()
    device = torch.device("cpu")
    whole = fixed_features._cache_features(method, batches([0, 1, 2]), split, device, StopSignal()).cache
    padded = fixed_features._cache_features(method, batches([0, 1], [2, -1]), split, device, StopSignal()).cache
    assert padded.readable_n.tolist() == [True] * 3
    torch.testing.assert_close(padded[torch.arange(3)].pooled, whole[torch.arange(3)].pooled)

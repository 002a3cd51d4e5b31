"""``dist_vpt.load``: a run as a module, from Python alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import dist_vpt
from dist_vpt.cli.main import main
from dist_vpt.data.formats import open_splits
from dist_vpt.errors import DataError, RunFolderError, UserError, WeightsError
from dist_vpt.inference.attention import attend
from dist_vpt.inference.load import load_run
from dist_vpt.inference.saved import load
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training.inputs import resolve_inputs
from tests.running import pictures as write_pictures
from tests.running import train

METHODS = {
    "vpt": ("method.name=vpt", "method.prompts=2"),
    "linear": ("method.name=linear",),
    "mlp": ("method.name=mlp",),
    "vqt": ("method.name=vqt",),
    "combo": ("method.name=combo", "method.depth=1", "method.width=16", "method.heads=2", "optim.name=adamw"),
    "ladder": ("method.name=ladder", "optim.name=adamw"),
    "side": ("method.name=side", "optim.name=adamw"),
    "knn": ("method.name=knn",),
    "logistic": ("method.name=logistic",),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def data(root: Path) -> tuple[str, ...]:
    """Overrides for pictures in class folders."""
    return write_pictures(root)


@pytest.fixture(scope="module")
def runs(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in METHODS.items():
        train(folder / name, *data, *settings, "train.batch_size=20", "data.image_size=16", "protocol=default")
    return {name: folder / name for name in METHODS}


@pytest.fixture(scope="module")
def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.png"))[:5]


def test_a_picture_as_on_the_command_line(runs: dict[str, Path], files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["predict", str(runs["vpt"]), str(files[0]), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == load(runs["vpt"]).predict(files[0])


def test_pictures_in_all_their_forms(runs: dict[str, Path], files: list[Path]) -> None:
    tuned = load(runs["vpt"])
    wanted = [row["predictions"] for row in tuned.predict(files)]
    opened = [Image.open(file).convert("RGB") for file in files]
    arrays = [np.asarray(image) for image in opened]
    for forms in (opened, arrays, [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]):
        rows = tuned.predict(forms)
        assert [row["predictions"] for row in rows] == wanted
        assert [row["image"] for row in rows] == [0, 1, 2, 3, 4]
        assert tuned.predict(forms[0], top=1)[0]["predictions"][0]["class"] == wanted[0][0]["class"]
    mixed = tuned.predict([str(files[0]), opened[1]])
    assert [row["image"] for row in mixed] == [str(files[0]), 1]


def test_logits_are_those_of_the_transform(runs: dict[str, Path], files: list[Path], root: Path) -> None:
    tuned = load(runs["linear"])
    data = ImageFolder(str(root), tuned.transform)
    number = [path for path, _ in data.samples].index(str(files[0]))
    with torch.no_grad():
        probabilities_K = tuned(data[number][0][None].to(tuned.device)).softmax(1)[0]
    best = tuned.predict(files[0], top=1)[0]["predictions"][0]
    assert tuned.classes[int(probabilities_K.argmax())] == best["class"]
    assert round(float(probabilities_K.max()), 6) == best["probability"]


def test_the_transform_is_the_one_of_evaluation(runs: dict[str, Path]) -> None:
    tuned = load(runs["vpt"])
    split = open_splits(tuned.recipe.data)["test"]
    pixels = resolve_inputs(tuned.recipe).transform
    for number in range(3):
        picture = split.read(number)
        assert torch.equal(tuned.transform(picture), pixels.eval(picture))
    assert tuned.transform(split.read(0)).dtype == torch.uint8


def test_transparent_and_turned_pictures_are_read_as_files(runs: dict[str, Path], tmp_path: Path) -> None:
    """A PIL image that a program has opened gives what the same file gives."""
    tuned = load(runs["vpt"])
    ink = np.zeros((20, 30, 4), np.uint8)
    ink[3:9, 4:20, 3] = 255
    Image.fromarray(ink).save(tmp_path / "ink.png")
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for name in ("ink.png", "turned.png"):
        file = tmp_path / name
        with Image.open(file) as image:
            assert tuned.predict(image)[0]["predictions"] == tuned.predict(file)[0]["predictions"]
    with Image.open(tmp_path / "ink.png") as image:
        assert tuned.transform(image)[:, 0, 0].tolist() == [255, 255, 255]  # the default background of one's own data


@pytest.mark.parametrize("method", METHODS)
def test_features_are_what_the_head_reads(method: str, runs: dict[str, Path], files: list[Path]) -> None:
    tuned = load(runs[method])
    features_BF = tuned.features(files)
    assert features_BF.shape[0] == len(files)
    assert features_BF.dtype == torch.float32
    assert torch.equal(features_BF[:1], features_BF[:1].clone())
    assert (features_BF[0] - features_BF[1]).abs().max() > 0
    if method == "knn":
        assert features_BF.norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)
        return
    with torch.no_grad():
        logits_BK = tuned(tuned.load_images(files)).cpu()
        of_head_BK = tuned.method.head.cpu()(features_BF)
    assert of_head_BK.numpy() == pytest.approx(logits_BK.numpy(), abs=1e-4)


def test_attention_is_a_softmax_over_all_tokens(runs: dict[str, Path], files: list[Path]) -> None:
    tuned = load(runs["vpt"])
    found = tuned.attention(files)
    backbone = tuned.method.backbone
    assert len(found.class_token) == len(backbone.blocks)
    assert found.class_token[0].shape[::3] == (len(files), backbone.patches)
    assert found.prompts[0].shape[2] == 2
    eager = load_run(str(runs["vpt"]), "last", attention="eager")
    wanted = attend(eager.method, eager.load_images(files))
    assert torch.equal(found.class_token[-1], wanted.class_token[-1])
    before = tuned.predict(files)
    tuned.attention(files[0])
    assert tuned.predict(files) == before  # the kernels are those of before again


def test_adapters_and_files_of_a_run(runs: dict[str, Path]) -> None:
    last, best = load(runs["vpt"]), load(runs["vpt"], adapters="best")
    for tuned, name in ((last, "adapters"), (best, "best")):
        stored, _ = read_adapters(runs["vpt"] / f"{name}.safetensors")
        assert torch.equal(dict(tuned.method.adapter_tensors())["prompts"].cpu(), stored["prompts"])
        again = load(runs["vpt"] / f"{name}.safetensors")
        assert torch.equal(dict(again.method.adapter_tensors())["prompts"].cpu(), stored["prompts"])


def test_it_is_a_module(runs: dict[str, Path]) -> None:
    tuned = load(str(runs["vpt"]), device="cpu")
    assert tuned.device.type == "cpu"
    assert not tuned.training
    assert tuned.recipe.method.name == "vpt"
    assert tuned.classes == ["a", "b"]
    assert "ImageTransform" in repr(tuned.transform)


BAD = [
    (lambda run, tmp: load(tmp / "none"), RunFolderError, "not a run folder"),
    (lambda run, tmp: load(run / "result.json"), WeightsError, "damaged, or no .safetensors file"),
    (lambda run, tmp: load(run / "recipe.yaml", adapters="best"), UserError, "leave it out"),
    (lambda run, tmp: load(run, adapters="worst"), UserError, "must be 'last' or 'best'"),
    (lambda run, tmp: load(run).predict(tmp / "none.png"), UserError, "no such file or folder"),
    (lambda run, tmp: load(run).predict([]), None, ""),
    (lambda run, tmp: load(run).predict(tmp), UserError, "holds no image"),
    (lambda run, tmp: load(run).predict(torch.zeros(3, 8, 8)), DataError, "float32 .*uint8"),
    (lambda run, tmp: load(run).predict(np.zeros((8, 8), np.uint8)), DataError, r"\[H, W, 3\]"),
    (lambda run, tmp: load(run).predict([5]), DataError, "a picture is a int"),
    (lambda run, tmp: load(run).predict(Image.new("I", (8, 8))), DataError, "32-bit"),
    (lambda run, tmp: load(run).predict(np.zeros((8, 8, 3), np.uint8), top=0), UserError, "at least 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message, runs: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if error is None:
        assert call(runs["vpt"], tmp_path) == []
        return
    with pytest.raises(error, match=message):
        call(runs["vpt"], tmp_path)


def test_a_run_that_has_not_ended(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / name).write_bytes((runs["vpt"] / name).read_bytes())
    with pytest.raises(UserError, match=r"adapters\.safetensors"):
        load(tmp_path)


def test_what_has_a_path(runs: dict[str, Path]) -> None:
    assert load(SimpleNamespace(path=runs["vpt"])).classes == ["a", "b"]
    assert dist_vpt.load is load

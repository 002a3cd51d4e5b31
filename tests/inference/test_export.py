"""Exported files: what each runtime makes of them is what the run gives, for every method."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dist_vpt import __version__
from dist_vpt.backbones.build import DEMO
from dist_vpt.backbones.vit import Backbone
from dist_vpt.cli.main import main
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import UserError, WeightsError
from dist_vpt.inference import export_onnx, export_torch
from dist_vpt.inference.export_check import Check, logits_of
from dist_vpt.inference.export_preprocessing import ExportedModel, Resize
from dist_vpt.inference.exported_weights import load_export
from dist_vpt.inference.load import load_run
from dist_vpt.inference.predict import predict
from dist_vpt.methods import METHODS
from dist_vpt.runs.adapters import read_adapters, write_adapters
from tests.backbones import test_swin
from tests.docs.pages import blocks
from tests.inference.exported import fitted_or_random, metadata_of, run_onnx, run_torch
from tests.methods.conftest import make_backbone
from tests.methods.test_structure import SETTINGS
from tests.running import ROOT, few_digits, train

pytestmark = pytest.mark.usefixtures("on_the_cpu")
BATCHES = (1, 7)
ON_VIT = SETTINGS | {"knn": {"name": "knn", "k": 5}, "vqt projected": {"name": "vqt", "form": "projected"}}
ON_SWIN = test_swin.SETTINGS | {name: ON_VIT[name] for name in ("knn", "logistic")}
FRAMED = "vpt frame"  # around images of 12 pixels
FAST = [("vpt deep", "class_token"), ("vqt", "registers")]
MORE = ["vpt deep", "vqt", "lora", "combo"]  # where blocks rotate queries and keys
CASES: list[tuple[str, str]] = [
    *((name, kind) for name in ON_VIT for kind in ("class_token", "registers")),
    *((name, "dinov3") for name in MORE),
    *((name, "swin") for name in ON_SWIN),
]


def test_every_method_is_exported_below() -> None:
    assert {ON_VIT[name]["name"] for name, kind in CASES if kind == "registers"} == set(METHODS)


@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES]
)
def test_logits_in_each_runtime(name: str, kind: str, tmp_path: Path) -> None:
    """One image and seven, from one file."""
    on_swin = kind == "swin"
    backbone: Backbone = test_swin.make_backbone() if on_swin else make_backbone(kind)
    method = fitted_or_random((ON_SWIN if on_swin else ON_VIT)[name], backbone)
    images = noise(7, 32 if on_swin else 12 if name == FRAMED else 16)
    expected = [logits_of(method, [images[:count]]) for count in BATCHES]
    check = Check(
        tuple([images[:count]] for count in BATCHES), tuple(expected), (torch.zeros(2, *images.shape[1:]).byte(),)
    )
    with torch.no_grad():
        recorded = export_torch.record(ExportedModel(method), check.example, ["images"], dynamic_batch=True)
        export_torch.write(tmp_path / "made.pt2", recorded, {}, check, quantize=False)
        export_onnx.write(tmp_path / "made.onnx", recorded, {}, check, quantize=False)
    for run in (run_torch, run_onnx):
        for count, logits in zip(BATCHES, expected, strict=True):
            found = run(tmp_path / f"made.{'pt2' if run is run_torch else 'onnx'}", images[:count])
            assert found.shape == logits.shape
            assert np.abs(found - logits).max() <= 1e-4 * max(1, np.abs(logits).max())
    assert np.abs(expected[1] - expected[1][0]).max() > 1e-2  # they depend on the image


def noise(count: int, side: int, channels_last: bool = False) -> np.ndarray:
    shape = (count, side, side, 3) if channels_last else (count, 3, side, side)
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


# Resizing inside

SIZES = [(41, 57), (57, 41), (16, 16), (17, 16), (1, 1), (2, 90), (300, 9), (90, 64), (400, 200), (224, 224)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "vpt"])
@pytest.mark.parametrize("crop_mode", ["squash", "crop"])
@pytest.mark.parametrize("side", [16, 224])
def test_resizing_is_that_of_training_to_the_last_bit(interpolation: Any, crop_mode: Any, side: int) -> None:
    transform = ImageTransform(side, interpolation, crop_mode)
    resize = Resize(transform)
    for height, width in SIZES:
        picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        found = resize(torch.from_numpy(picture).permute(2, 0, 1)[None])[0]
        assert found.dtype == torch.float32
        assert torch.equal(found, transform.eval(picture).float()), (height, width)


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of VPT with settings of the runtime that must not get into a file."""
    path = tmp_path_factory.mktemp("runs") / "vpt"
    runtime = ("runtime.precision=bf16", "runtime.attention=eager", "runtime.activation_checkpointing=block")
    more = ("data.image_size=16", "train.batch_size=400", "train.test=false", "optim.lr=0.5")
    train(path, *runtime, *more, "data.interpolation=bicubic", "data.crop_mode=squash")
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (57, 41, 3), np.uint8)).save(path)
    return path


def logits_of_run(run: Path, *pictures: np.ndarray) -> np.ndarray:
    loaded = load_run(str(run), "last", precision="fp32")
    with torch.no_grad():
        return loaded.method(torch.stack([loaded.inputs.transform.eval(each) for each in pictures])).numpy()


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_run_as_a_program(suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One image, in float32, and what the file says about itself."""
    out, pictures = tmp_path / f"run{suffix}", noise(1, 16, channels_last=True)
    assert main(["export", str(folder), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{out}: ")
    assert "logits differ from the run's by at most" in text
    run = run_onnx if suffix == ".onnx" else run_torch
    assert run(out, pictures.transpose(0, 3, 1, 2)) == pytest.approx(logits_of_run(folder, *pictures), abs=1e-4)
    facts = metadata_of(out)
    assert facts["classes"] == [str(n) for n in range(10)]
    shown = {"task": "digits", "method": "vpt", "backbone": "demo", "adapters": "last", "dist_vpt": __version__}
    shown |= {"image_size": 16, "interpolation": "bicubic", "crop_mode": "squash", "preprocessing": "normalize"}
    shown |= {"dtype": "uint8", "quantize": "none"}
    assert {key: facts[key] for key in shown} == shown
    assert (len(facts["mean"]), len(facts["std"])) == (3, 3)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert str(ROOT).encode() not in out.read_bytes()
    with pytest.raises(Exception, match=r"(?i)invalid|guard failed"):
        run(out, noise(2, 16))  # its batch is 1


def test_normalized_images_go_in(folder: Path, tmp_path: Path) -> None:
    out, pictures = tmp_path / "run.onnx", noise(3, 16, channels_last=True)
    options = ["--dynamic-batch", "--preprocessing", "none", "--adapters", "best"]
    assert main(["export", str(folder), "--out", str(out), *options]) == 0
    facts = metadata_of(out)
    assert (facts["dtype"], facts["preprocessing"], facts["adapters"]) == ("float32", "none", "best")
    normalized = (pictures / 255 - facts["mean"]) / facts["std"]
    found = run_onnx(out, normalized.transpose(0, 3, 1, 2).astype(np.float32))
    assert found == pytest.approx(logits_of_run(folder, *pictures), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_pictures_of_any_size_go_in(suffix: str, folder: Path, tmp_path: Path) -> None:
    out, run = tmp_path / f"run{suffix}", run_onnx if suffix == ".onnx" else run_torch
    assert main(["export", str(folder), "--out", str(out), "--preprocessing", "resize", "--dynamic-batch"]) == 0
    for count, height, width in ((1, 57, 41), (2, 9, 30), (3, 16, 16), (1, 240, 101)):
        pictures = np.random.default_rng(width).integers(0, 256, (count, height, width, 3), np.uint8)
        found = run(out, np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
        assert found == pytest.approx(logits_of_run(folder, *pictures), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_int8(suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, small, pictures = tmp_path / f"run{suffix}", tmp_path / f"small{suffix}", noise(4, 16, channels_last=True)
    for out, more in ((plain, []), (small, ["--quantize", "int8"])):
        assert main(["export", str(folder), "--out", str(out), "--dynamic-batch", *more]) == 0
    assert "int8: logits of noise differ from the run's by at most" in capsys.readouterr().out
    assert small.stat().st_size < 0.4 * plain.stat().st_size
    facts = metadata_of(small)
    assert (facts["quantize"], len(facts["classes"])) == ("int8", 10)
    expected = logits_of_run(folder, *pictures)
    found = (run_onnx if suffix == ".onnx" else run_torch)(small, pictures.transpose(0, 3, 1, 2).copy())
    difference = np.abs(found - expected).max()
    assert 1e-4 < difference < 0.1 * np.abs(expected).max()
    assert {path.name for path in tmp_path.iterdir()} == {plain.name, small.name}


def test_weights_that_need_no_other_file(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pictures = tmp_path / "run.safetensors", noise(3, 16, channels_last=True)
    assert main(["export", str(folder), "--out", str(out)]) == 0
    assert "dist-vpt predict takes it in place of a run" in capsys.readouterr().out
    loaded = load_export(out)
    images = torch.stack([loaded.inputs.transform.eval(each) for each in pictures])
    with torch.no_grad():
        assert loaded.method(images).numpy() == pytest.approx(logits_of_run(folder, *pictures), abs=1e-4)
    facts = read_adapters(out)[1]
    assert (facts["method"], facts["contents"], facts["image_size"]) == ("vpt", "backbone and method", 16)
    assert main(["predict", str(out), str(picture), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert main(["predict", str(out), str(picture), "--adapters", "best"]) == 2
    assert "--adapters best: " in capsys.readouterr().err


def test_no_file_names_a_path_of_the_machine(tmp_path: Path, picture: Path) -> None:
    """The recipe is in the file as `push` shares it; what loads the file needs nothing that it leaves out."""
    weights = tmp_path / "secret" / "weights.safetensors"
    weights.parent.mkdir()
    shutil.copyfile(DEMO, weights)
    run, out = tmp_path / "run", tmp_path / "run.safetensors"
    data = few_digits(tmp_path / "pictures")
    train(run, f"backbone.weights={weights}", "backbone.name=demo", *data, "data.image_size=16", "train.test=false")
    assert main(["export", str(run), "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        metadata = json.dumps(file.metadata())
    assert str(tmp_path) not in metadata
    assert "not-shared:weights.safetensors@sha256:" in metadata
    expected = predict(str(run), [str(picture)], top=10)
    shutil.rmtree(weights.parent)
    shutil.rmtree(run)
    found = predict(str(out), [str(picture)], top=10)
    for row, other in zip(found[0]["predictions"], expected[0]["predictions"], strict=True):
        assert row == {"class": other["class"], "probability": pytest.approx(other["probability"], abs=1e-5)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["full", "cls", "bias", "knn", "lora", "vpt method.location=pad method.deep=false", "combo method.width=8"],
)
def test_weights_of_every_kind_of_method_load_again(method: str, tmp_path: Path, data: tuple[str, ...]) -> None:
    """A method may take over tensors of the backbone, start from them, or have sizes that no recipe gives."""
    name, *more = method.split()
    run, out = tmp_path / "run", tmp_path / "run.safetensors"
    prompts = ["method.prompts=2"] if name == "vpt" else []
    train(run, f"method.name={name}", *more, *prompts, *data, "data.image_size=16", "train.test=false")
    assert main(["export", str(run), "--out", str(out)]) == 0
    shutil.rmtree(run / "state", ignore_errors=True)
    pictures = noise(2, 16, channels_last=True)
    loaded = load_export(out)
    with torch.no_grad():
        found = loaded.method(torch.stack([loaded.inputs.transform.eval(each) for each in pictures])).numpy()
    assert found == pytest.approx(logits_of_run(run, *pictures), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_merged_programs(method: str, tmp_path: Path, data: tuple[str, ...]) -> None:
    """Adapters leave no operation behind."""
    run, pictures = tmp_path / "run", noise(1, 16, channels_last=True)
    train(run, f"method.name={method}", *data, "data.image_size=16", "train.test=false")
    nodes = []
    for more in ([], ["--merge"]):
        out = tmp_path / f"run{len(more)}.onnx"
        assert main(["export", str(run), "--out", str(out), *more]) == 0
        assert run_onnx(out, pictures.transpose(0, 3, 1, 2)) == pytest.approx(logits_of_run(run, *pictures), abs=1e-4)
        nodes.append(count_nodes(out))
    assert nodes[1] < 0.8 * nodes[0]


def count_nodes(file: Path) -> int:
    import onnx

    return len(onnx.load(file).graph.node)


@pytest.mark.slow
def test_several_backbones(tmp_path: Path, data: tuple[str, ...]) -> None:
    """An input for each, and one for all where resizing is inside."""
    run = tmp_path / "run"
    members = "backbones=[{name: demo, image_size: 16}, {name: demo, image_size: 24}]"
    train(run, members, "method.name=combo", "method.width=8", *data, "train.test=false")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 30, 41, 3), np.uint8)
    loaded = load_run(str(run), "last")
    arrays = [np.stack([t.eval(each).numpy() for each in pictures]) for t in loaded.inputs.transforms]
    expected = logits_of(loaded.method, arrays)
    for name, options, given in (
        ("two.onnx", [], arrays),
        ("one.onnx", ["--preprocessing", "resize"], [pictures.transpose(0, 3, 1, 2)]),
        ("two.pt2", [], arrays),
    ):
        out = tmp_path / name
        assert main(["export", str(run), "--out", str(out), "--dynamic-batch", *options]) == 0
        run_file = run_onnx if out.suffix == ".onnx" else run_torch
        assert run_file(out, *map(np.ascontiguousarray, given)) == pytest.approx(expected, abs=1e-4)
        names = [each["name"] for each in metadata_of(out)["inputs"]]
        assert names == (["images", "images"] if options else ["demo_16", "demo_24"])


# Without this package

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names!r})); sys.argv[:] = {argv!r}\n"


def script(name: str) -> str:
    """The script of this name in the guide."""
    return next(block.text for block in blocks(ROOT / "docs" / "deploy.md") if block.file == name)


@pytest.mark.slow
@pytest.mark.parametrize(("interpolation", "crop_mode"), [("bilinear", "crop"), ("bicubic", "squash")])
def test_the_guides_script_needs_neither_torch_nor_this_package(  # noqa: PLR0917 (fixtures)
    interpolation: str,
    crop_mode: str,
    picture: Path,
    tmp_path: Path,
    data: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a picture that is no square."""
    run, out = tmp_path / "run", tmp_path / "run.onnx"
    resizing = (f"data.interpolation={interpolation}", f"data.crop_mode={crop_mode}")
    train(run, *data, "data.image_size=16", "train.test=false", *resizing)
    assert main(["export", str(run), "--out", str(out), "--preprocessing", "resize"]) == 0
    text = script("classify.py")
    assert len([line for line in text.splitlines() if line.strip()]) <= 13
    code = BLOCKED.format(names=["dist_vpt", "torch", "torchvision", "timm"], argv=["", str(out), str(picture)]) + text
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    rows = predict(str(run), [str(picture)], top=3)
    found = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in found] == [best["class"] for best in rows[0]["predictions"]]
    assert [float(p) for _, p in found] == pytest.approx([b["probability"] for b in rows[0]["predictions"]], abs=1e-4)


@pytest.mark.slow
def test_the_guides_script_for_torch(
    folder: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.pt2"
    assert main(["export", str(folder), "--out", str(out), "--preprocessing", "resize"]) == 0
    code = BLOCKED.format(names=["dist_vpt", "timm"], argv=["", str(out), str(picture)]) + script("classify_torch.py")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    loaded = load_run(str(folder), "last", precision="fp32")
    with torch.no_grad():
        shares = loaded.method(loaded.load_images([picture])).softmax(1)[0]
    values, at = shares.topk(3)
    assert done.stdout.split()[::2] == [loaded.classes[k] for k in at.tolist()]
    assert [float(p) for p in done.stdout.split()[1::2]] == pytest.approx(values.tolist(), abs=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/run.bin"], "must end in .pt2, .onnx, .safetensors; rename it"),
        (["--out", "{tmp}/run.pt", "--format", "torch"], "must end in .pt2, for --format torch; rename it"),
        (["--out", "{tmp}/run.onnx", "--format", "torch"], "must end in .pt2, for --format torch; rename it"),
        (["--out", "{tmp}/nix/run.onnx"], "there is no folder {tmp}/nix; create it first"),
        (["--out", "{tmp}/folder.onnx"], "folder.onnx: cannot be written; name another file"),
        (["--out", "{tmp}/r.safetensors", "--quantize", "int8"], "--quantize int8: a .safetensors file holds float32"),
        (["--out", "{tmp}/r.safetensors", "--dynamic-batch"], "--dynamic-batch: a .safetensors file holds float32"),
        (["--out", "{tmp}/r.safetensors", "--preprocessing", "none"], "--preprocessing none: a .safetensors file"),
        (["--out", "{tmp}/run.onnx", "--merge"], "a VPT computes what no plain timm model does"),
    ],
)
def test_options_that_do_not_fit(  # noqa: PLR0917 (fixtures)
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is built."""
    monkeypatch.setattr("dist_vpt.inference.export.build_backbone", lambda *_: pytest.fail("built"))
    (tmp_path / "folder.onnx").mkdir()
    assert main(["export", str(folder), *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message.format(tmp=tmp_path) in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


def without_adapters(run: Path) -> None:
    (run / "adapters.safetensors").unlink()


def cut_adapters(run: Path) -> None:
    file = run / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:300])


def other_recipe(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("prompts: 2", "prompts: 3"))


def quantized(run: Path) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("quantize: none", "quantize: int8"))


def no_run(run: Path) -> None:
    (run / "recipe.yaml").unlink()


def sweep(run: Path) -> None:
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"kind": "sweep"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_adapters, "no adapters here; the run has not ended"),
        (cut_adapters, "damaged adapters"),
        (other_recipe, "prompts has shape"),
        (quantized, "runtime.quantize = int8: exported weights are those of the backbone's file, not quantized"),
        (no_run, "not a run folder"),
        (sweep, "is a sweep; name one of its runs"),
    ],
)
@pytest.mark.parametrize("name", ["run.onnx", "run.safetensors"])
def test_runs_that_cannot_be_exported(  # noqa: PLR0917 (fixtures)
    damage: Callable[[Path], None],
    message: str,
    name: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    damage(run)
    assert main(["export", str(run), "--out", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package(
    package: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(folder), "--out", str(tmp_path / "run.onnx")]) == 2
    error = capsys.readouterr().err
    assert f"--format onnx: {package} is not installed" in error
    assert "pip install 'dist-vpt[export]', or use --format torch" in error


def test_torchao_is_missing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert main(["export", str(folder), "--out", str(tmp_path / "run.pt2"), "--quantize", "int8"]) == 2
    assert "--quantize int8: torchao is not installed" in capsys.readouterr().err


def test_a_file_with_other_logits_is_not_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "run.pt2"
    before.write_bytes(b"what was there")
    written = export_torch.write
    monkeypatch.setattr(
        export_torch, "write", lambda file, recorded, facts, check, *, quantize: written(
            file, recorded, facts, Check(check.inputs, tuple(each + 0.1 for each in check.expected), check.example),
            quantize=quantize,
        ),
    )  # fmt: skip
    assert main(["export", str(folder), "--out", str(before)]) == 2
    assert "gives other logits than the run: they differ by up to 0.1" in capsys.readouterr().err
    assert before.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt2"]


def test_what_torch_cannot_record(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(torch.export, "export", refuse)
    assert main(["export", str(folder), "--out", str(tmp_path / "run.pt2")]) == 2
    assert "method.name = vpt on demo cannot be exported as torch (RuntimeError: no such operation); use --format" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_frame_of_pixels_needs_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ("method.location=pad", "method.deep=false", "method.prompts=4")
    train(run, *options, "data.image_size=16", "train.batch_size=400", "train.test=false")
    assert main(["export", str(run), "--out", str(tmp_path / "run.onnx"), "--preprocessing", "none"]) == 2
    assert "method.location = pad puts a frame of pixels around the image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contents": "timm weights"}, "holds plain timm weights"),
        ({"contents": None}, "is no file of `dist-vpt export`"),
        ({"recipe": {"seed": "many"}}, "its recipe is not one of this version"),
    ],
)
def test_files_that_hold_something_else(change: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    tensors, facts = read_adapters(out)
    write_adapters(out, tensors, {k: v for k, v in (facts | change).items() if v is not None})
    with pytest.raises(UserError, match=message):
        load_export(out)


def test_files_of_other_kinds_and_damaged_ones(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.safetensors"
    assert main(["export", str(folder), "--out", str(out)]) == 0
    tensors, facts = read_adapters(out)
    name = next(name for name in tensors if name.startswith("backbone."))
    write_adapters(out, {n: t for n, t in tensors.items() if n != name}, facts)
    with pytest.raises(WeightsError, match="is missing; export the run again"):
        load_export(out)
    write_adapters(out, tensors | {name: tensors[name][:1].flatten()[:1]}, facts)
    with pytest.raises(WeightsError, match="not the weights of its recipe"):
        load_export(out)
    out.write_bytes(out.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"damaged, or no \.safetensors file"):
        load_export(out)
    with pytest.raises(UserError, match=r"run\.onnx: no such file"):
        load_export(tmp_path / "run.onnx")
    (tmp_path / "run.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="an ONNX file; run it with onnxruntime"):
        load_export(tmp_path / "run.onnx")

"""What a run tells of its data: the protocol beside the scores, and the splits that were carved."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_vpt.backbones.build import DEMO, Preprocessing
from dist_vpt.data.config import DataConfig, resolve
from dist_vpt.errors import RunFolderError
from dist_vpt.experiments.sweep import sweep
from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.inference.load import load_run
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.components import build_components
from dist_vpt.training.inputs import channels
from tests.reference.positions import aligned
from tests.running import train, words

WANTS = Preprocessing(24, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (WANTS.mean, WANTS.std)),
        ({"normalize": "vpt"}, IMAGENET),
        ({"normalize": "none"}, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))),
        ({"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}, ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))),
        ({"task": "dtd", "root": "x"}, IMAGENET),
        ({"task": "dtd", "root": "x", "normalize": "weights"}, (WANTS.mean, WANTS.std)),
        ({"task": "cub", "root": "x"}, IMAGENET),
    ],
)
def test_mean_and_std(settings, wanted) -> None:
    data = DataConfig(**settings)
    assert channels(data, resolve(data), WANTS) == wanted


def test_float_pixels_are_normalised_as_whole_ones_are() -> None:
    method = build_components(load_recipe([], words(Path("x"), "data.normalize=vpt"))).method
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(method(images), method(images.float()))
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in IMAGENET)
    stem = method.backbone.stem
    assert torch.allclose(method.backbone.embed(images), stem((images / 255 - mean) / std), atol=1e-5)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Sixty images in two classes, without splits."""
    root = tmp_path / "data"
    for i in range(60):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (i, 255 * (i % 2), 0)).save(path)
    return root


def options(root: Path) -> list[str]:
    return ["data.task=mine", "data.format=image_folder", f"data.root={root}", "train.batch_size=16", "run.trackers=[]"]


def test_a_run_writes_its_protocol_and_carved_splits(pictures: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", *options(pictures), "data.interpolation=vpt", "data.crop_mode=squash")
    assert result["protocol"] == {
        "settings": "published",
        "storage": "image_folder", "resize": "vpt", "fit": "squash", "augment": "none", "normalize": "weights",
        "fraction": 1.0, "carved": ["test", "val"], "image_size": 8, "notes": [], "exif": "transpose",
        "background": "white", "position_resize": "vpt",
        "counts": {"train": 42, "val": 6, "trainval": 48, "test": 12},
    }  # fmt: skip
    carved = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert {name: len(files) for name, files in carved.items()} == {"val": 6, "test": 12}
    assert not set(carved["val"]) & set(carved["test"])
    assert all(Path(file).is_file() for files in carved.values() for file in files)


def test_how_positions_are_resampled_is_recorded_and_used_again(pictures: Path, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", [*options(pictures), "train.epochs=2", "optim.warmup_epochs=0"]
    as_vpt = train(run, *steps, "backbone.position_resize=vpt")
    assert as_vpt["protocol"]["position_resize"] == "vpt"
    loaded, built = (
        each.method.backbone.stem.pos_embed
        for each in (
            load_run(str(run), "last"),
            build_components(load_recipe([], words(tmp_path / "other", *steps, "backbone.position_resize=timm"))),
        )
    )
    demo_1ND = load_file(DEMO)["pos_embed"].float().numpy()
    side = round(built[0, 1:].shape[0] ** 0.5)
    assert abs(loaded.numpy() - aligned(demo_1ND, 1, side, side)).max() < 1e-6
    assert not torch.allclose(loaded, built, atol=1e-3)
    with pytest.raises(RunFolderError, match=r"backbone.position_resize: vpt -> timm"):
        train(run, *steps, "run.resume=auto", "backbone.position_resize=timm")
    assert evaluate_run(str(run), "test", "last") == as_vpt["last"]["test"]


def test_a_sweeps_runs_do_too(pictures: Path, tmp_path: Path) -> None:
    grid = ["sweep.grid={optim: {lr: [0.1]}}", "sweep.seeds=[3]", "method.name=linear"]
    sweep(load_recipe([], words(tmp_path / "sweep", *options(pictures), *grid)))
    run = tmp_path / "sweep" / "seeds" / "3"
    assert set(json.loads((run / "splits.json").read_text())) == {"val", "test"}
    assert json.loads((run / "result.json").read_text())["protocol"]["storage"] == "image_folder"


def test_splits_that_are_there_are_not_written(tmp_path: Path) -> None:
    train(tmp_path / "run")
    assert not (tmp_path / "run" / "splits.json").exists()

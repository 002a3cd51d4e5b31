"""benchmarks/defaults.py: the larger copy of a backbone, the task made by formula, and a line of the table."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from dist_vpt.backbones.build import build
from dist_vpt.backbones.config import BackboneConfig
from tests.running import ROOT, TINY, few_digits

LOOK: dict[str, Any] = {"image_size": 24, "mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.fixture
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_defaults", ROOT / "benchmarks" / "defaults.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_larger_backbone_computes_the_same(benchmark: ModuleType, tmp_path: Path) -> None:
    path = benchmark.write_scaled(tmp_path, ["base", "data.task=digits"], 10.0)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    plain, _ = build(BackboneConfig(name="demo"), **LOOK)
    larger, _ = build(BackboneConfig(name="demo", weights=str(path)), **LOOK)
    with torch.no_grad():
        assert torch.allclose(larger.embed(images), 10 * plain.embed(images), rtol=1e-4, atol=1e-4)
        assert torch.allclose(larger.pool(larger(images)), 10 * plain.pool(plain(images)), rtol=1e-2, atol=1e-2)


def test_discs_are_counted(benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "TRAIN", 8)
    root = benchmark.write_counting(tmp_path / "few", 4, 0)
    lines = (root / "train800val200.txt").read_text().splitlines()
    assert len(lines) == 12
    assert {int(line.split()[1]) for line in lines} <= set(range(6))
    assert Image.open(root / "images/0.png").size == (benchmark.SIDE, benchmark.SIDE)

    more = benchmark.write_counting(tmp_path / "more", 9, 0)
    assert len((more / "val200.txt").read_text().splitlines()) == 9
    assert (more / "train800val200.txt").read_text().splitlines()[:12] == lines
    assert all((more / f"images/{i}.png").read_bytes() == (root / f"images/{i}.png").read_bytes() for i in range(12))

    others = benchmark.write_counting(tmp_path / "others", 4, 1)
    assert (others / "images/0.png").read_bytes() != (root / "images/0.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "cls"])
def test_a_line_compares_and_trains_nothing_twice(benchmark: ModuleType, tmp_path: Path, method: str) -> None:
    small = [word for word in TINY if not word.startswith(("protocol", "optim"))]
    shared = ["base", *few_digits(tmp_path / "data"), *small]
    default = benchmark.default_line(tmp_path, method, shared)
    narrow = {"lr": [0.5, 1.0], "weight_decay": [0.0]}
    line = benchmark.grid_line(tmp_path, method, shared, narrow)
    assert "of 2 at optim.lr=" in line
    assert line.count(", difference ") == 1
    outcomes = sorted((tmp_path / "published/trials").glob("*.json"))
    settings = [json.loads(path.read_text())["setting"] for path in outcomes]
    assert sorted(setting["optim.lr"] for setting in settings) == [0.5, 1.0]
    assert {setting["optim.weight_decay"] for setting in settings} == {0.0}

    written = [path.stat().st_mtime_ns for path in (tmp_path / "default/result.json", *outcomes)]
    assert benchmark.default_line(tmp_path, method, shared) == default
    assert benchmark.grid_line(tmp_path, method, shared, narrow) == line
    wider = benchmark.grid_line(tmp_path, method, shared, {"lr": [0.5, 1.0], "weight_decay": [0.0, 0.01]})
    assert "of 4 at" in wider
    assert [path.stat().st_mtime_ns for path in (tmp_path / "default/result.json", *outcomes)] == written
    with pytest.raises(SystemExit, match=r"holds the scores of base .*; name another OUT"):
        benchmark.default_line(tmp_path, method, [*shared, "seed=1"])


@pytest.mark.slow
def test_halving_scores_the_last_rung(benchmark: ModuleType, tmp_path: Path) -> None:
    small = [word for word in TINY if not word.startswith(("protocol", "optim"))]
    halving = ["train.epochs=4", "sweep.search=halving", "sweep.min_epochs=1"]
    shared = ["base", *few_digits(tmp_path / "data"), *small, *halving]
    benchmark.default_line(tmp_path, "linear", shared)
    assert "of 5 at optim.lr=" in benchmark.grid_line(tmp_path, "linear", shared, {})  # of 20

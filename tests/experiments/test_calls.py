"""``dist_vpt.train`` and ``dist_vpt.sweep``: the command line's runs, called."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

import dist_vpt
from dist_vpt.errors import DataError, RecipeError, RunFolderError
from dist_vpt.training.accelerator import reset_accelerate
from tests.running import ROOT, TINY

SETTINGS: dict[str, Any] = dict(override.split("=", 1) for override in TINY)  # dotted keys
SETTINGS = {
    key: json.loads(value) if value[0].isdigit() or value == "true" else value for key, value in SETTINGS.items()
}


def test_a_run(tmp_path: Path) -> None:
    run = dist_vpt.train({"method": {"name": "linear"}}, run={"dir": str(tmp_path / "run")}, **SETTINGS)
    assert run.status == "done"
    assert run.path == tmp_path / "run"
    assert run.recipe.method.name == "linear"
    assert run.result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["split"] for row in run.metrics] == ["train", "val", "test"]
    assert run.metrics[-1]["top1"] == run.result["last"]["test"]["top1"]
    assert "done" in repr(run)
    assert run.load().predict([]) == []
    with pytest.raises(RunFolderError, match="holds a run already"):
        dist_vpt.train(run.recipe)
    assert dist_vpt.train(run.recipe, run={"resume": "auto"}).result == run.result


def test_it_is_the_run_of_the_command_line(tmp_path: Path) -> None:
    from dist_vpt.cli.main import main

    run = dist_vpt.train("linear", run={"dir": str(tmp_path / "called")}, **SETTINGS)
    assert main(["train", "linear", *TINY, f"run.dir={tmp_path / 'typed'}"]) == 0
    typed = json.loads((tmp_path / "typed" / "result.json").read_text())
    assert run.result["last"] == typed["last"]
    assert run.recipe == dist_vpt.Run(tmp_path / "typed").recipe.changed("run", dir=str(run.path))


def test_a_sweep(tmp_path: Path) -> None:
    grid = {"grid": {"optim": {"lr": [0.1, 0.01]}}, "seeds": [0, 11]}
    sweep = dist_vpt.sweep("linear", sweep=grid, run={"dir": str(tmp_path / "sweep")}, **SETTINGS)
    assert [run.path.name for run in sweep.runs] == ["0", "11"]
    assert sweep.result == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert all(run.status == "done" for run in sweep.runs)
    with pytest.raises(RunFolderError, match="is a sweep"):
        dist_vpt.Run(sweep.path)
    with pytest.raises(RunFolderError, match="is a sweep"):
        dist_vpt.load(sweep)


def test_lines_of_a_run_that_is_being_written(tmp_path: Path) -> None:
    run = dist_vpt.train("linear", run={"dir": str(tmp_path / "run")}, **SETTINGS)
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"epoch": 2, "spl')
    assert len(run.metrics) == 3
    (run.path / "result.json").unlink()
    assert run.result == {}


@pytest.mark.parametrize(
    ("recipe", "overrides", "error", "message"),
    [
        ("linar", {}, RecipeError, "did you mean 'linear'"),
        ("linear", {"train": {"epoch": 1}}, RecipeError, "arguments: train.epoch = 1: unknown key"),
        ({"method": {"name": "lin"}}, {}, RecipeError, "recipe: method.name = 'lin'"),
        (["linear", "vqt"], {}, RecipeError, "2 recipes of the kind method"),
        (["linear", 3], {}, RecipeError, "no int"),
        (None, {}, RecipeError, "no NoneType"),
        ("linear", {"data": {"format": "image_folder", "task": "x", "root": "/none"}}, DataError, "is not a folder"),
        ("linear", {"backbone": {"weights": "/none.pt"}}, dist_vpt.UserError, "none.pt"),
    ],
)
def test_bad_input(recipe: Any, overrides: dict[str, Any], error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        dist_vpt.train(recipe, run={"dir": str(tmp_path / "run")}, **overrides)
    assert not (tmp_path / "run").exists()


def test_mistakes_show_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, dist_vpt\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n"
        "    dist_vpt.train('linear', data={'format': 'image_folder', 'task': 'x', 'root': '/none'})\n"
        "except dist_vpt.UserError as error:\n"
        "    print(error)\n"
        "assert 'torch' not in sys.modules\n"
        "import dist_vpt.train\n"
        "try:\n"
        "    dist_vpt.train('linar')\n"
        "except dist_vpt.UserError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "data.root '/none': /none is not a folder; use the folder of the dataset",
        "1 mistake in the recipe:",
        "  recipe: linar: neither a file nor the name of a recipe; did you mean 'linear'?",
    ]


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Accelerate's state is global in a process."""
    reset_accelerate()
    yield
    reset_accelerate()


def test_an_accelerator_of_the_program_stays_as_it_was(no_accelerator: None, tmp_path: Path) -> None:
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    dist_vpt.train("linear", run={"dir": str(tmp_path / "run")}, **SETTINGS)
    assert own.gradient_accumulation_steps == 4
    assert own.state.mixed_precision == "no"


def test_an_accelerator_of_another_precision_is_named(no_accelerator: None, tmp_path: Path) -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(dist_vpt.UserError, match="this program has an Accelerator of another device or precision"):
        dist_vpt.train("linear", run={"dir": str(tmp_path / "run")}, **SETTINGS)


@pytest.mark.parametrize("method", ["linear", "vpt_shallow"])
def test_a_sweep_leaves_no_accelerator(method: str, no_accelerator: None, tmp_path: Path) -> None:
    sweep = {"grid": {"optim": {"lr": [0.1]}}, "seeds": [0]}
    dist_vpt.sweep(method, sweep=sweep, run={"dir": str(tmp_path / "run")}, **SETTINGS)
    assert Accelerator(cpu=True, mixed_precision="bf16").state.mixed_precision == "bf16"


def test_every_public_name_is_there() -> None:
    for name in dist_vpt.__all__:
        assert getattr(dist_vpt, name) is not None
    assert set(dist_vpt.__all__) <= set(dir(dist_vpt))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        dist_vpt.trian  # noqa: B018

"""Small runs for tests: the demo backbone on digits, a second each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from dist_vpt.experiments.run import run
from dist_vpt.recipe.loading import load_recipe

ROOT = Path(__file__).parents[1]
TINY = [
    "protocol=published",
    "optim.name=sgd",
    "optim.scale_lr=true",
    "data.workers=0",
    "data.image_size=8",
    "optim.lr=0.1",
    "train.epochs=1",
    "train.batch_size=200",
    "run.log_every=1",
]

SMALLEST = [  # on few_images
    "protocol=published",
    "backbone.name=test_vit",
    "backbone.weights=random",
    "data.task=mine",
    "data.format=vtab_folder",
    "data.image_size=32",
    "data.workers=0",
    "method.prompts=1",
    "optim.scale_lr=false",
    "train.batch_size=4",
    "run.log_every=1",
]


def few_images(root: Path) -> Path:
    """A dataset of 22 images of three classes: six steps of SMALLEST an epoch, the last one smaller."""
    draw, lines = np.random.default_rng(0), []
    (root / "images").mkdir()
    for i in range(22):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(root / "images" / f"{i}.png")
        lines.append(f"images/{i}.png {i % 3}\n")
    for name, kept in (("train800", lines), ("val200", lines[:6]), ("train800val200", lines), ("test", lines[:6])):
        (root / f"{name}.txt").write_text("".join(kept))
    return root


def few_digits(root: Path) -> tuple[str, ...]:
    """Overrides for the first of the digits, as files: 100 images to train on, 20 of val and 59 of test."""
    from sklearn.datasets import load_digits

    digits, lines = load_digits(), []
    root.mkdir(parents=True, exist_ok=True)
    for i, (ink, label) in enumerate(zip(digits.images[:179], digits.target[:179], strict=True)):
        Image.fromarray((255 - ink * (255 / 16)).astype(np.uint8)).convert("RGB").save(root / f"{i}.png")
        lines.append(f"{i}.png {label}\n")
    parts = {"train800": lines[:100], "val200": lines[100:120], "train800val200": lines[:120], "test": lines[120:]}
    for name, kept in parts.items():
        (root / f"{name}.txt").write_text("".join(kept))
    return ("data.task=mine", "data.format=vtab_folder", f"data.root={root}", "train.batch_size=20")


def pictures(folder: Path, *, broken: Callable[[int], bool] = lambda i: False) -> tuple[str, ...]:
    """Overrides for 60 small images in two classes, with seeded splits."""
    for i in range(60):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (4 * i, 200 * (i % 2), 0)).save(path)
        if broken(i):
            path.write_bytes(path.read_bytes()[:40])
    return ("data.task=mine", "data.format=image_folder", f"data.root={folder}", "train.batch_size=16")


def words(folder: Path, *overrides: str) -> list[str]:
    """The overrides of a tiny run."""
    prompts = [] if any(word.startswith("method.name=") for word in overrides) else ["method.prompts=2"]
    return [*TINY, *prompts, f"run.dir={folder}", *overrides]


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """One run in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    return run(load_recipe([], words(folder, *overrides)))


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_losses(folder: Path) -> list[float]:
    """The loss of every step, from TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def start(strategy: str, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A run on two processes, started as the README says: launch/local.sh, or accelerate with one of our files."""
    rest = words(folder, *overrides)
    if strategy == "ddp":
        command = [str(ROOT / "launch" / "local.sh"), "ddp", "2", *rest]
    else:
        file = "accelerate_config.yaml" if strategy == "zero2" else f"launch/accelerate/{strategy}.yaml"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
        command = [*launch, "--main_process_port", "0", "--config_file", file, "-m", "dist_vpt.train", *rest]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # local.sh and DeepSpeed look things up
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 400) -> str:
    """Wait for a run and give its output. Ends its whole process group where it hangs."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung:\n{output[-3000:]}") from None
    return output


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if "RANK" in _environment(p) and "dist_vpt.train" in " ".join(p.cmdline())]


def wait_for(condition: Any, seconds: float = 300) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}

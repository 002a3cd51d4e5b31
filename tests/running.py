"""Small runs for tests: the demo backbone on digits, seconds each."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from dist_vpt.recipe import load_recipe
from dist_vpt.train import run

TINY = [
    "data.workers=0",
    "data.image_size=8",
    "method.prompts=2",
    "optim.lr=0.1",
    "train.epochs=1",
    "train.batch_size=200",
    "run.log_every=1",
]


def train(folder: Path, *overrides: str) -> dict[str, Any]:
    """One run in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(*([True] if state is AcceleratorState else []))
    return run(load_recipe([], [*TINY, f"run.dir={folder}", *overrides]))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(strategy: str, folder: Path, *overrides: str, port: int = 0, **options: Any) -> subprocess.Popen[str]:
    """A run on two processes: ``ddp``, or ``zeroN`` with the repository's or an equal DeepSpeed file."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if strategy == "ddp":
        words += ["--multi_gpu"]
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        words += ["--use_deepspeed", "--deepspeed_config_file", str(_deepspeed_file(strategy, folder))]
    words += ["-m", "dist_vpt.train", *TINY, f"run.dir={folder}", *overrides]
    return subprocess.Popen(
        words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """Wait for a run; its output. Ends the whole process group where it hangs."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung:\n{output[-3000:]}") from None
    return output


def _deepspeed_file(strategy: str, folder: Path) -> Path:
    given = Path(__file__).parents[1] / "launch" / "accelerate" / f"{strategy}.json"
    if given.exists():
        return given
    path = folder.parent / f"{strategy}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": int(strategy.removeprefix("zero"))}}))
    return path

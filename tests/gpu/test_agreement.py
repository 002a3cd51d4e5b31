"""A step of several processes, each on a GPU of its own, reads nothing until the next one is issued."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.running import ROOT, words

pytestmark = [pytest.mark.gpu, pytest.mark.distributed]
SOURCE = """
import json, sys, warnings, torch
from dist_vpt.planning.measure import make_training, synthetic_batches
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.engine import train_step
from dist_vpt.training.inputs import resolve_inputs

recipe = load_recipe([], json.loads(sys.argv[1]))
inputs = resolve_inputs(recipe)
training, batches = make_training(recipe, inputs, 10), synthetic_batches(recipe, inputs, 10)
cuda, steps = torch.cuda.is_available(), []
for number in range(6):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        steps.append(train_step(training, batches, norms=False))
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    training.progress.step += 1
waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
print(json.dumps({"waits": waits, "late": [step.late for step in steps], "losses": [s.read().loss for s in steps]}))
"""


def test_a_step_of_two_processes_waits_for_nothing(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU is no two processes over NCCL")
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    options = [*words(tmp_path / "run", "runtime.device=auto", "method.prompts=2", "train.grad_accum_steps=2")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SOURCE, json.dumps(options)],
            env=variables | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate()[0].splitlines()[-1]) for process in processes)
    assert first["late"] == second["late"] == [False, True, True, True, True, True]
    assert first["waits"] == second["waits"] == 0
    assert first["losses"] == second["losses"]

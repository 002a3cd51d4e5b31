"""``dist_vpt.train`` in a script of one's own under ``accelerate launch``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT, finish

pytestmark = pytest.mark.distributed

SCRIPT = r"""
import dist_vpt

run = dist_vpt.train(
    "linear",
    protocol="published",
    data={"image_size": 8, "workers": 0},
    train={"epochs": 2, "batch_size": 200},
    run={"dir": FOLDER},
)
print(f"{run.status}: {run.result['last']['test']['top1']:.6f}")
try:
    dist_vpt.train("linear", run={"dir": FOLDER})
except dist_vpt.UserError as error:
    # One write: torchrun's python is unbuffered, and print writes each of its arguments by itself, so that the lines
    # of two processes can mix.
    print(f"refused: {error}\n", end="")
"""


def test_processes_share_a_run(tmp_path: Path) -> None:
    results = []
    for processes in (1, 2):
        folder, script = tmp_path / f"of-{processes}", tmp_path / f"{processes}.py"
        script.write_text(SCRIPT.replace("FOLDER", repr(str(folder))))
        options = ["--config_file", "launch/accelerate/ddp.yaml", "--num_processes", "2", "--main_process_port", "0"]
        launch = ["-m", "accelerate.commands.launch", *options] if processes > 1 else []
        process = subprocess.Popen(
            [sys.executable, *launch, str(script)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        output = finish(process)
        assert process.returncode == 0, output
        result = json.loads((folder / "result.json").read_text())
        assert result["processes"] == processes
        assert output.count(f"done: {result['last']['test']['top1']:.6f}") == processes
        assert output.count("refused: ") == processes
        results.append(result)
    assert results[0]["last"]["test"]["loss"] == pytest.approx(results[1]["last"]["test"]["loss"], rel=1e-4)

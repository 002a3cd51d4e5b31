"""benchmarks/policies.py: what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "policies.py"
TINY = ["backbone.name=demo", "backbone.weights=random", "train.batch_size=2", "runtime.device=cpu", "--repeats", "2"]


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--out", str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_last_line_is_the_file_and_holds_every_policy(tmp_path: Path) -> None:
    done = start(tmp_path, "--policies", "none", "mlp", "budget-0.5", "block")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (file,) = tmp_path.iterdir()
    assert (file.name, json.loads(file.read_text())) == ("policies-vpt-demo-b2-fp32-cpu.json", result)
    for name in ("saved_for_backward_mib", "of_none", "step_ms", "time_of_none"):
        assert list(result[name]) == ["none", "mlp", "budget-0.5", "block"]
        assert all(value > 0 for value in result[name].values())
    # All are measured on the same weights, and none changes another.
    shares = list(result["of_none"].values())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == result["time_of_none"]["none"] == 1
    assert shares[2] < 0.6
    assert shares[3] < 0.2


def test_none_comes_first(tmp_path: Path) -> None:
    done = start(tmp_path, "--policies", "block", "none")
    assert done.returncode == 2
    assert "all are compared with none; begin with it" in done.stderr

"""benchmarks/peers.py: what it prints, and what it refuses to compare."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"
TINY = ["backbone.name=demo", "train.batch_size=2", "runtime.device=cpu", "--repeats", "3", "--classes", "5"]


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--out", str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("method", ["full", "linear", "lora"])
def test_last_line_is_the_file_and_holds_both(method: str, tmp_path: Path) -> None:
    """That it ends well also says that both give the same logits, and train as many numbers."""
    if method == "lora":
        pytest.importorskip("peft")
    done = start(tmp_path, f"method.name={method}", "runtime.precision=fp32")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    (file,) = tmp_path.iterdir()
    assert (file.name, json.loads(file.read_text())) == (f"peers-{method}-demo-b2-fp32-cpu.json", result)
    assert result["logits_difference"] < 1e-5
    assert list(result["step_ms"]) == list(result["saved_for_backward_mib"]) == ["dist_vpt", "peer"]
    low, high = result["ratio_quartiles"]
    assert 0 < low <= result["ratio"] <= high
    assert result["peer"] == ("peft" if method == "lora" else "timm")
    assert ("peft" in result["versions"]) == (method == "lora")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.name=bias"], "method.name = bias: only lora, full, linear have a peer here"),
        (["method.targets=[q]"], "must be two of q, k and v"),
        (["optim.name=sgd"], "optim.name = sgd: the peer's is adamw"),
        (["runtime.precision=fp16"], "runtime.precision = fp16: must be one of fp32, bf16"),
        (["train.grad_accum_steps=2"], "train.grad_accum_steps = 2: must be 1 here"),
    ],
)
def test_what_it_does_not_compare_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    done = start(tmp_path, *words)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not list(tmp_path.iterdir())

"""benchmarks/export.py: what it prints and writes, and that a second call measures what is missing alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "export.py"


def start(folder: Path, *methods: str) -> subprocess.CompletedProcess[str]:
    options = ["--backbones", "demo", "--batch", "2", "--repeats", "3", "--classes", "5", "--out", str(folder)]
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--methods", *methods],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_row_for_each_method(tmp_path: Path) -> None:
    first = start(tmp_path, "linear", "knn")
    assert first.returncode == 0, first.stderr
    (file,) = tmp_path.iterdir()
    assert file.name == "export-demo-b2-cpu.json"
    rows = json.loads(file.read_text())["rows"]
    for row in rows.values():
        assert row["difference"] <= 1e-4 < row["difference_int8"]
        assert row["mib"]["int8"] < row["mib"]["onnx"]
        assert set(row["images_per_s"]) == {"eager", "onnx", "int8"}
    second = start(tmp_path, "linear", "knn", "mlp")
    assert second.returncode == 0, second.stderr
    after = json.loads(file.read_text())["rows"]
    assert {name: after[name] for name in rows} == rows
    assert second.stdout.count("demo mlp: {") == 1
    assert [line.split(" | ")[0] for line in second.stdout.splitlines()[-3:]] == ["| `linear`", "| `knn`", "| `mlp`"]

"""The script of docs/deploy.md that uses an exported file without this package."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_vpt.cli.main import main
from tests.running import ROOT, few_digits, train

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_it_gives_what_predict_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a picture that is no square, too, which evaluation crops."""
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(# classify\.py\n.*?)```", page, re.DOTALL)
    assert found is not None
    script, photo, run = tmp_path / "classify.py", tmp_path / "photo.png", tmp_path / "run"
    script.write_text(found[1], encoding="utf-8")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    train(run, *few_digits(tmp_path / "data"), "data.crop_mode=crop", "runtime.precision=fp32")
    exported = str(tmp_path / "any-size.onnx")
    assert main(["export", str(run), "--out", exported, "--preprocessing", "resize"]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), str(photo), "--top", "3"]) == 0
    expected = [
        (row["class"], float(row["probability"])) for row in csv.DictReader(io.StringIO(capsys.readouterr().out))
    ]
    output = subprocess.run(
        [sys.executable, script, exported, photo], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    printed = [line.split() for line in output.splitlines()]
    assert [name for name, _ in printed] == [name for name, _ in expected]
    assert [float(share) for _, share in printed] == pytest.approx([share for _, share in expected], abs=1e-4)

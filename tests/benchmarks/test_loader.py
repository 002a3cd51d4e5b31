"""benchmarks/loader.py: its last line is the whole result, and every example was shown."""

import json
import subprocess
import sys

import pytest

from tests.running import ROOT

pytestmark = pytest.mark.slow


def test_last_line_is_the_whole_result() -> None:
    words = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--images", "70", "--examples", "300"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["examples"] == 300
    assert found["loader_images_per_s"] > 0
    assert found["bare_images_per_s"] > 0
    assert 0 < found["resident_mib"] < 8192
    assert found["versions"]["dist-vpt"]

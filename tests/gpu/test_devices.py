"""runtime.device=cpu on a machine with a GPU: the driver lists no context of the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import words

pytestmark = pytest.mark.gpu


def test_the_cpu_opens_no_context(tmp_path: Path) -> None:
    source = (
        "import sys, torch; from dist_vpt.experiments.run import run; "
        "from dist_vpt.recipe.loading import load_recipe; run(load_recipe([], sys.argv[1:])); "
        "assert not torch.cuda.is_initialized()"
    )
    options = words(tmp_path / "run", "runtime.device=cpu", "data.workers=1", "data.task=digits")
    done = subprocess.run([sys.executable, "-c", source, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

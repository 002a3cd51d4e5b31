"""The notebooks of the docs run from top to end, and are saved with the outputs of such a run."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

from tests.running import ROOT

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "tools" / "run_notebooks.py")
assert spec
assert spec.loader
run_notebooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_notebooks)


@pytest.mark.parametrize("file", run_notebooks.NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_from_top_to_end(file: Path, tmp_path: Path) -> None:
    """A cell that raises ends it; the saved outputs are of the same kinds."""
    saved, now = nbformat.read(file, as_version=4), run_notebooks.execute(file, tmp_path)
    for before, after in zip(saved.cells, now.cells, strict=True):
        kinds = [sorted({output.output_type for output in cell.get("outputs", [])}) for cell in (before, after)]
        assert kinds[0] == kinds[1], f"{file.name}: {before.source}: run tools/run_notebooks.py"
    assert not any(output.get("name") == "stderr" for cell in now.cells for output in cell.get("outputs", []))
    assert not list(tmp_path.iterdir())  # a notebook leaves nothing where it runs


def test_there_is_one() -> None:
    assert run_notebooks.NOTEBOOKS

"""Run the notebooks of the docs from top to end, and save them with their outputs: ``python tools/run_notebooks.py``.

What differs from run to run (times, execution counts, the kernel's version) is left out of the files.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 600  # of one cell, on a busy machine


def execute(file: Path, folder: Path | None = None) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel, which works in ``folder``. Raises CellExecutionError."""
    os.environ.pop("MPLBACKEND", None)  # the kernel has its own, which shows figures
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    notebook = nbformat.read(file, as_version=4)
    where = {} if folder is None else {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.clear()
    return notebook


def main() -> int:
    for file in NOTEBOOKS:
        notebook = execute(file)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, file)
        print(file.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Mistakes that show in a moment are reported before anything slow is imported, and nothing is written."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dist_vpt.errors import RunFolderError
from dist_vpt.experiments.early_checks import check_early
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs.folder import RunFolder
from tests.running import words

OWN = ["data.task=mine", "data.format=image_folder"]
TABLE = ["data.task=mine", "data.format=table"]
MISTAKES = {
    ("nix.yaml",): "nix.yaml: no such recipe file; correct the path",
    ("optim.lrr=1",): "unknown key; did you mean 'lr'?",
    (*OWN, "data.root=nix"): "data.root 'nix': {root}/nix is not a folder; use the folder of the dataset",
    (*OWN, "data.root=one"): "{root}/one: has one class only, 'cat'; is data.root a folder too high or too low?",
    (*OWN, "data.root=empty"): "{root}/empty: has no class folders; give each class a folder of images",
    (*TABLE, "data.root=lables.csv"): "{root}/lables.csv does not exist; did you mean 'labels.csv'?",
    (*TABLE, "data.root=labels.csv"): "labels.csv: none of its columns 'a', 'b' has a usual name of the images' paths",
    (*TABLE, "data.root=labels.csv", "data.table={image: a, label: b}"): "labels.csv: has one class only, 'cat'",
    ("dtd", "data.root=empty"): "nor is there a vtab-1k folder",
    ("backbone.weights=nix.pth",): "nix.pth: no such weights file; give backbone.weights an existing .safetensors",
    ("run.dir=one",): "one: holds files (cat) but no run; choose another run.dir",
}
PROGRAM = """
import sys
from dist_vpt.cli.main import main
print(main(sys.argv[1:]))
print(sorted({"torch", "timm", "deepspeed", "accelerate", "transformers"} & set(sys.modules)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sweep"])
@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: arguments[-1])
def test_before_torch_is_imported(command: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "one/cat").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.csv").write_text("a,b\none/cat/a.png,cat\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "one/cat/a.png")
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["2", "[]"]
    assert MISTAKES[arguments].format(root=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_folder_in_use_or_of_another_recipe(tmp_path: Path) -> None:
    recipe = load_recipe([], words(tmp_path / "run"))
    check_early(recipe)
    folder = RunFolder(tmp_path / "run")
    with folder.acquire(recipe), pytest.raises(RunFolderError, match="another run is at work here"):
        check_early(recipe)
    with pytest.raises(RunFolderError, match=r"holds a run already \(status: running\); use run.resume=auto"):
        check_early(recipe)
    with pytest.raises(RunFolderError, match="holds the run of another recipe"):
        check_early(load_recipe([], words(tmp_path / "run", "optim.lr=0.3", "run.resume=auto")))
    with pytest.raises(RunFolderError, match="holds a run, not a sweep"):
        check_early(recipe, "sweep")
    check_early(load_recipe([], words(tmp_path / "run", "run.resume=auto")))
    folder.mark("failed")  # before it saved anything
    files = sorted(path.name for path in folder.path.iterdir())
    check_early(recipe)
    assert sorted(path.name for path in folder.path.iterdir()) == files

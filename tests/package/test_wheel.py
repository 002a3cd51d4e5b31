"""The wheel, installed into a fresh environment and used in an empty folder, far from any clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import ROOT

pytestmark = pytest.mark.slow

SOURCES = ("dist_vpt", "configs", "launch", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TINY = ["data.image_size=8", "train.epochs=1", "optim.warmup_epochs=0", "train.batch_size=200", "run.trackers=[]"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the clone gets no build/."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", copy / "wheels", copy], copy)
    (found,) = (copy / "wheels").iterdir()
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, which sees the packages of the running one."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    run(
        [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index", wheel],
        folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "running.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture
def dist_vpt(environment: Path, empty: Path) -> Run:
    """The command, in an empty folder that all tests of this file share."""
    return lambda *arguments: run([environment / "bin" / "dist-vpt", *arguments], empty)


def test_the_wheel_has_every_file(wheel: Path) -> None:
    files = {path.relative_to(ROOT / "dist_vpt") for path in (ROOT / "dist_vpt").rglob("*.*")}
    files |= {path.relative_to(ROOT) for folder in ("configs", "launch") for path in (ROOT / folder).rglob("*.*")}
    expected = {f"dist_vpt/{file}" for file in files if "__pycache__" not in file.parts and file.suffix != ".md"}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if name.startswith("dist_vpt/")}
        scripts = [info for info in archive.infolist() if info.filename.endswith(".sh")]
    assert found == {name for name in expected if Path(name).suffix}
    assert len(scripts) == 3
    assert all((ROOT / name).stat().st_mode & 0o111 == (info.external_attr >> 16) & 0o111
               for info in scripts for name in [info.filename.removeprefix("dist_vpt/")])  # fmt: skip


def test_the_package_is_the_installed_one(environment: Path, empty: Path) -> None:
    code = "import dist_vpt; print(dist_vpt.__file__)"
    assert run([environment / "bin" / "python", "-c", code], empty).stdout.startswith(str(environment))


def test_recipe_list(dist_vpt: Run) -> None:
    lines = dist_vpt("recipe", "list").stdout.splitlines()
    assert lines[0].split() == ["name", "kind", "what"]
    assert len(lines) == 1 + len(list((ROOT / "configs").rglob("*.yaml")))
    assert {("vpt_deep", "method"), ("dtd", "task"), ("digits/vqt", "complete")} <= {
        tuple(x.split()[:2]) for x in lines
    }


def test_train(dist_vpt: Run, empty: Path) -> None:
    dist_vpt("train", "digits/linear", *TINY)
    assert (empty / "runs" / "linear" / "result.json").is_file()


def test_a_copied_recipe_trains_with_the_launch_script(dist_vpt: Run, environment: Path, empty: Path) -> None:
    (empty / "elsewhere").mkdir()
    dist_vpt("recipe", "copy", "digits/linear", "elsewhere/mine.yaml")
    (script,) = environment.glob("lib/python*/site-packages/dist_vpt/launch/local.sh")
    run([script, "ddp", "2", "elsewhere/mine.yaml", *TINY], empty)
    assert (empty / "runs" / "mine" / "result.json").is_file()


def test_sweep(dist_vpt: Run, empty: Path) -> None:
    grid = ["sweep.grid.optim.lr=[0.1]", "sweep.grid.optim.weight_decay=[0.0, 0.01]", "sweep.seeds=[0]"]
    dist_vpt("sweep", "digits/vqt", *TINY, *grid)
    assert (empty / "runs" / "vqt" / "sweep.json").is_file()


def test_suite_and_slurm_scripts(dist_vpt: Run, environment: Path, empty: Path) -> None:
    suite = ("suite", "sup_b16_in21k", "--tasks", "natural", "--method", "vpt_deep", "vqt", "--root", "/data")
    plan = dist_vpt(*suite, "--dry-run").stdout
    assert all(task in plan for task in ("caltech101", "dtd", "svhn"))
    names = ("vpt_deep", "dtd", "sup_b16_in21k", "data.root=/data")
    script = dist_vpt("launch", "slurm", *names, "--time", "4:00:00", "--dry-run").stdout
    (functions,) = environment.glob("lib/python*/site-packages/dist_vpt/launch/slurm.sh")
    assert f"\npython={environment / 'bin' / 'python'}\n" in script
    assert f"\nsource {functions} || exit 2\ntrain_in_job ddp {' '.join(names)}\n" in script
    dist_vpt(*suite, "--slurm", "array.sbatch")
    assert f"source {functions}" in (empty / "array.sbatch").read_text()

"""tools/versions.py: what it pins, what it would run, and what it says where that fails. Nothing is installed."""

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from tests.running import ROOT

RANGES = """
[project]
dependencies = ["torch>=2.10,<3", "torchvision>=0.25,<1", "timm>=1.0.21,<1.1", "numpy>=2", "accelerate>=1.12,<2",
    "transformers>=5,<6"]
"""
STANDS_FOR_PIP = "import sys; sys.exit('no such version' if 'pip' in sys.argv else 0)"


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, in a checkout that holds nothing but a pyproject.toml."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(RANGES)
    return module


def replace_python(versions: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """In place of the environment's Python, code that sees the arguments."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(versions, "python_of", lambda _folder: fake)
    monkeypatch.setattr(versions.sys, "executable", str(fake))


def test_the_lowest_versions_are_the_lower_bounds(versions: ModuleType) -> None:
    pins = ["torch==2.10", "torchvision==0.25", "timm==1.0.21", "accelerate==1.12", "transformers==5"]
    assert versions.constraints("lowest", RANGES) == pins


def test_the_newest_versions_stay_in_their_ranges(versions: ModuleType) -> None:
    pins = ["torch>=2.10,<3", "torchvision>=0.25,<1", "timm>=1.0.21,<1.1", "accelerate>=1.12,<2", "transformers>=5,<6"]
    assert versions.constraints("highest", RANGES) == pins


@pytest.mark.parametrize("which", ["lowest", "highest"])
def test_the_ranges_of_this_checkout_are_read(versions: ModuleType, which: str) -> None:
    pins = versions.constraints(which, (ROOT / "pyproject.toml").read_text())
    assert [pin.partition("==" if which == "lowest" else ">=")[0] for pin in pins] == list(versions.PINNED)


def test_the_commands(versions: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    venv, lowest = versions.environment_commands("lowest", folder)
    assert venv == [sys.executable, "-m", "venv", str(folder)]
    assert lowest[:4] == [str(folder / "bin" / "python"), "-m", "pip", "install"]
    assert lowest[-4:] == ["--constraint", str(folder / "constraints.txt"), "--editable", f"{tmp_path}[dev]"]
    assert "--upgrade" not in lowest
    assert "--upgrade" in versions.environment_commands("highest", folder)[1]
    tests = versions.tests_command(folder, ["tests/backbones", "-x"])
    assert tests[1:] == ["-m", "pytest", "-q", "-m", versions.MARKS, "tests/backbones", "-x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RANGES.replace("timm>=1.0.21,<1.1", "timm"), "gives no range NAME>=LOW,<HIGH for timm"),
        ("[project]", "has no list project.dependencies that can be read"),
        ("[project", "has no list project.dependencies that can be read"),
    ],
)
def test_ranges_that_cannot_be_read(
    versions: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert versions.main(["lowest"]) == 1
    assert capsys.readouterr().err.startswith(f"tools/versions.py: pyproject.toml {message}")


def test_an_installation_that_fails_is_one_line(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    replace_python(versions, monkeypatch, tmp_path, STANDS_FOR_PIP)
    assert versions.main(["lowest"]) == 1
    reason, line = capfd.readouterr().err.splitlines()
    assert reason == "no such version"
    assert line.startswith("tools/versions.py: the environment could not be made, for the reason above: ")
    assert "timm==1.0.21\n" in (tmp_path / "build" / "versions" / "lowest" / "constraints.txt").read_text()


@pytest.mark.parametrize(
    "closing", ["1 failed, 1 passed in 0.13s", "== 3 passed, 1 warning in 75.20s (0:01:15) ==", "no tests ran in 0.02s"]
)
def test_versions_and_pytests_closing_line_end_the_output(
    versions: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    closing: str,
) -> None:
    code = (
        "import sys\nif '-c' in sys.argv: print('timm 1.0.21')\n"
        f"if 'pytest' in sys.argv: print('F.', '', '{closing}', 'leaked 2 types!', '', sep='\\n'); sys.exit(3)"
    )
    replace_python(versions, monkeypatch, tmp_path, code)
    assert versions.main(["lowest", "-x", "-m", "slow"]) == 3
    assert capsys.readouterr().out.endswith(f"lowest: timm 1.0.21\nlowest: {closing}\n")


def test_the_versions_that_are_named_are_those_of_the_environment(versions: ModuleType) -> None:
    command = [sys.executable, "-c", versions.SHOW, "pytest", "timm"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    python = ".".join(map(str, sys.version_info[:3]))
    assert shown.strip() == f"python {python}, pytest {version('pytest')}, timm {version('timm')}"


def test_tests_find_the_programs_of_the_environment(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_python(versions, monkeypatch, tmp_path, "import os\nprint(os.environ['PATH'].split(os.pathsep)[0])")
    assert versions.run_tests(tmp_path, []) == (0, str(tmp_path))


def test_tests_that_are_killed_do_not_end_with_a_success(
    versions: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import os, sys\nprint('...')\nsys.stdout.flush()\nif 'pytest' in sys.argv: os.kill(os.getpid(), 9)"
    replace_python(versions, monkeypatch, tmp_path, code)
    assert versions.main(["lowest"]) == 1
    assert capsys.readouterr().err == "tools/versions.py: pytest was ended by signal 9 (Killed)\n"


def test_an_unknown_name_is_refused_without_a_traceback() -> None:
    command = [sys.executable, ROOT / "tools" / "versions.py", "oldest"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'oldest'" in done.stderr
    assert "Traceback" not in done.stderr

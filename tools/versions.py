"""Run the tests on the lowest or on the newest versions that pyproject.toml allows.

    python tools/versions.py lowest                           # torch and four others at their lower bounds
    python tools/versions.py highest                          # everything as new as pip finds it
    python tools/versions.py lowest tests/backbones -x        # pytest's arguments

Each has a virtual environment of its own, build/versions/lowest or build/versions/highest, which the next call reuses:
some gigabytes, most of them CUDA libraries. pip's own settings hold (PIP_EXTRA_INDEX_URL for torch without CUDA). The
tests are those of `make check` unless an ``-m`` is given. The exit code is pytest's; 1 where the environment fails or
pytest is killed.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not all dependencies: the oldest of all at once are seldom a set that pip can install, and these five are what breaks.
PINNED = ("torch", "torchvision", "timm", "accelerate", "transformers")
MARKS = "not (gpu or distributed or slurm or slow)"
RANGE = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<low>\d[\w.]*)(?P<rest>[^;]*)")
CLOSING = re.compile(r".*\b(\d+ [a-z]+|no tests ran)\b.* in \d+\.\d+s\b.*")  # pytest's, which it need not end with
SHOW = (
    "import platform, sys; from importlib.metadata import version; "
    "print('python', platform.python_version(), end=''); print(*(f', {n} {version(n)}' for n in sys.argv[1:]), sep='')"
)


class Failed(Exception):
    """What went wrong, in a line for the terminal."""


def constraints(which: str, pyproject: str) -> list[str]:
    """pip's constraints on the pinned packages: their lower bounds alone, or their whole ranges."""
    try:
        dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise Failed(f"pyproject.toml has no list project.dependencies that can be read: {error}") from error
    found = {match["name"]: match for match in map(RANGE.fullmatch, map(str.strip, dependencies)) if match}
    missing = [name for name in PINNED if name not in found]
    if missing:
        raise Failed(f"pyproject.toml gives no range NAME>=LOW,<HIGH for {', '.join(missing)}")
    if which == "lowest":
        return [f"{name}=={found[name]['low']}" for name in PINNED]
    return [f"{name}>={found[name]['low']}{found[name]['rest']}" for name in PINNED]


def environment_commands(which: str, folder: Path) -> list[list[str]]:
    """What makes the virtual environment, or brings an earlier one up to date."""
    # Not --quiet: of versions that exclude each other pip would not say which they are.
    install = [str(python_of(folder)), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
    newest = ["--upgrade", "--upgrade-strategy", "eager"] if which == "highest" else []
    return [
        [sys.executable, "-m", "venv", str(folder)],
        [*install, *newest, "--constraint", str(folder / "constraints.txt"), "--editable", f"{ROOT}[dev]"],
    ]


def tests_command(folder: Path, arguments: Sequence[str]) -> list[str]:
    """pytest in the environment; of two ``-m`` it takes the last."""
    return [str(python_of(folder)), "-m", "pytest", "-q", "-m", MARKS, *arguments]


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def make_environment(which: str, folder: Path) -> str:
    """Make the virtual environment; returns the versions in it."""
    try:
        pins = constraints(which, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "constraints.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    except OSError as error:
        raise Failed(f"{error.filename}: {error.strerror}") from error
    print(f"{folder}: {', '.join(pins)}", flush=True)
    for command in environment_commands(which, folder):
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise Failed(f"the environment could not be made, for the reason above: {' '.join(command)}")
    shown = subprocess.run([python_of(folder), "-c", SHOW, *PINNED], text=True, capture_output=True, check=False)
    if shown.returncode:
        raise Failed(f"{folder} does not hold {', '.join(PINNED)}; delete that folder and start again")
    return shown.stdout.strip()


def run_tests(folder: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run pytest, its output shown as it comes; returns its exit code and its closing line."""
    closing, last = "", "no output"
    # Programs that tests start, and those that packages look for (ninja), are the environment's.
    environment = os.environ | {"PATH": f"{python_of(folder).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with subprocess.Popen(
        tests_command(folder, arguments),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as tests:
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
            # Libraries may print more while Python ends, such as Triton 3.9 what it never freed.
            closing = last if CLOSING.fullmatch(last) else closing
    if tests.returncode < 0:  # killed, most often for memory
        raise Failed(f"pytest was ended by signal {-tests.returncode} ({signal.strsignal(-tests.returncode)})")
    return tests.returncode, closing or last


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment, run the tests, print versions and outcome; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the tests on the lowest or the newest allowed versions.")
    parser.add_argument("which", choices=["lowest", "highest"])
    parser.add_argument("pytest", nargs=argparse.REMAINDER, metavar="PYTEST ARGS", help=f"default: -m '{MARKS}'")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / "versions" / options.which
    try:
        versions = make_environment(options.which, folder)
        code, closing = run_tests(folder, options.pytest)
    except Failed as failure:
        print(f"tools/versions.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"{options.which}: {versions}\n{options.which}: {closing}")
    return code


if __name__ == "__main__":
    sys.exit(main())

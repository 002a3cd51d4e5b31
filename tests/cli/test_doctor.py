"""``dist-vpt doctor`` on this machine as it is, and with real faults: each report is of a process that has them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.backbones import products
from dist_vpt.cli import doctor
from dist_vpt.distributed.launch_env import LEFTOVERS
from dist_vpt.runtime import cpu_speed
from tests.running import ROOT

pytestmark = pytest.mark.slow

CHECKS = [
    "packages",
    "gpu",
    "precision",
    "launcher",
    "collectives",
    "deepspeed",
    "run folder",
    "shared memory",
    "flash attention",
    "extras",
]
CLEARED = (*LEFTOVERS, "CUDA_VISIBLE_DEVICES", "CXX", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

# Found by Python where it starts: an installed package whose library is missing.
BROKEN_IMPORT = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "{package}":
            raise ImportError("libmissing.so.1: cannot open shared object file\\nof libmissing.so.1")
sys.meta_path.insert(0, Broken())
"""
# Nothing is mounted for other processes.
SMALL_FILE_SYSTEMS = "mount -t tmpfs -o size=32m,nr_inodes=200 small /dev/shm && mount -t tmpfs -o size=32m small {}"


def examine(
    *argv: str, code: int, before: Sequence[str] = (), path: Path = ROOT, **variables: str
) -> tuple[dict[str, dict[str, str]], str]:
    """The results by their check, and what is printed to stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED} | variables
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [path, ROOT]))
    line = [*before, sys.executable, "-m", "dist_vpt", "doctor", "--json", *argv]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    levels = [result["level"] for result in report["checks"]]
    assert (report["errors"], report["warnings"]) == (levels.count("error"), levels.count("warning"))
    for result in report["checks"]:  # what is wrong has a fix, on the same line; what is well needs none
        assert bool(result["fix"]) == (result["level"] != "ok"), result
        assert "\n" not in result["found"] + result["fix"]
    assert [result["check"] for result in report["checks"]] == CHECKS
    return {result.pop("check"): result for result in report["checks"]}, done.stderr


def has(result: dict[str, str], level: str, *parts: str) -> None:
    assert result["level"] == level, result
    text = f"{result['found']}; {result['fix']}"
    for part in parts:
        assert part in text


def test_a_machine_that_is_fit(tmp_path: Path) -> None:
    found, error = examine("--run-dir", str(tmp_path / "runs" / "mine"), code=0)
    has(found["packages"], "ok", f"({sys.executable}) has all required packages")
    has(found["launcher"], "ok")
    has(found["collectives"], "ok", "works")
    has(found["deepspeed"], "ok", metadata.version("deepspeed"))
    has(found["run folder"], "ok", f"{tmp_path}: ", "GiB free")
    has(found["extras"], "ok", "installed: ")
    assert error == ""
    assert not list(tmp_path.iterdir()), "nothing is left, and nothing was made"


@pytest.mark.parametrize(("times", "more"), [(1.1, ""), (2.0, "; float32 products are by oneDNN, 2.0 times as fast")])
@pytest.mark.usefixtures("on_the_cpu")
def test_what_multiplies_fastest(times: float, more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_switch", {"onednn": False})
    monkeypatch.setattr(cpu_speed, "cpu_speed", lambda: cpu_speed.CPUSpeed(4, times))
    monkeypatch.setattr("dist_vpt.runtime.precision.cpu_speed", cpu_speed.cpu_speed)
    found = doctor.check_precision()
    assert found.level == "ok"
    start = f"auto is bf16, since this CPU multiplies {4 / times:.1f} times as fast in bf16 as in fp32{more}"
    assert found.found.startswith(start)
    assert bool(more) == ("oneDNN" in found.found)


def test_faults_of_an_environment(tmp_path: Path) -> None:
    """A package of another version, no compiler, no network of that name, a shell within a launcher."""
    wrong = tmp_path / "timm-0.1.dist-info"
    wrong.mkdir()
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.1\n")
    faults = {"RANK": "0", "WORLD_SIZE": "2", "PATH": "/nonexistent", "GLOO_SOCKET_IFNAME": "nosuch0"}
    faults |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    (file := tmp_path / "file").touch()
    found, error = examine("--run-dir", str(file / "runs"), code=2, path=tmp_path, **faults)
    has(found["packages"], "error", "timm 0.1: must be ", "pip install dist-vpt again")
    has(found["gpu"], "warning", "CUDA_VISIBLE_DEVICES = ''", "unset CUDA_VISIBLE_DEVICES")
    has(found["launcher"], "warning", "RANK=0 WORLD_SIZE=2 in this shell", "unset RANK WORLD_SIZE")
    has(found["collectives"], "error", "a sum over processes fails: ", "nosuch0", "GLOO_SOCKET_IFNAME")
    has(found["deepspeed"], "warning", "cannot be built: c++ not found", "apt install g++ ninja-build")
    has(found["run folder"], "error", f"{file} is not a folder", "--run-dir")
    assert error == "error: doctor: packages, collectives, run folder: fix what is listed above before a run\n"


@pytest.mark.parametrize("package", ["deepspeed", "torch"])
def test_a_package_whose_library_is_missing(package: str, tmp_path: Path) -> None:
    """In /proc nobody, not even root, can make a file."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN_IMPORT.format(package=package))
    found, _ = examine("--run-dir", "/proc/runs", code=2, path=tmp_path)
    check, how = ("gpu", "the check itself failed") if package == "torch" else ("deepspeed", "cannot be imported")
    has(found[check], "error", f"{how}: ", "libmissing.so.1", "install")
    has(found["run folder"], "error", "/proc: files cannot be written and locked: No such file", "-o flock")
    has(found["extras"], "ok")  # the other checks go on


def test_small_file_systems(tmp_path: Path) -> None:
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    mount = SMALL_FILE_SYSTEMS.format(tmp_path)
    command = [*apart, "sh", "-c", f'{mount} && exec "$@"', "sh"]
    faults = {"TORCH_EXTENSIONS_DIR": "/proc/x", "CUDA_VISIBLE_DEVICES": ""}
    found, _ = examine("--run-dir", str(tmp_path), code=2, before=command, **faults)
    has(found["deepspeed"], "warning", "/proc/x cannot be written (No such file", "set TORCH_EXTENSIONS_DIR")
    has(found["shared memory"], "error", "32 MiB free in /dev/shm: loader workers die", "--shm-size", "data.workers=0")
    has(found["run folder"], "error", f"{tmp_path}: 0.0 GiB free: too little", "use another disk")


def test_lines_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cheap = {name: check for name, check in doctor.checks(tmp_path).items() if name in ("run folder", "extras")}
    monkeypatch.setattr(doctor, "checks", lambda run_dir: cheap)
    doctor.doctor(str(tmp_path), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ok      run folder: {tmp_path}: ")
    assert lines[1].startswith("ok      extras: installed: ")
    assert lines[2:] == ["2 checks, warnings: 0, errors: 0"]

"""``dist-vpt doctor``: each condition is made or faked, and its message read."""

import json
import os
import pty
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_vpt.cli import doctor
from dist_vpt.cli.doctor import CheckResult
from dist_vpt.cli.main import main
from dist_vpt.distributed.launch_env import LEFTOVERS

Patch = pytest.MonkeyPatch
Usage = namedtuple("Usage", "total used free")
GIB = 2**30


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: Patch) -> None:
    for name in (*LEFTOVERS, "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "CXX"):
        monkeypatch.delenv(name, raising=False)


def gpus(monkeypatch: Patch, *, capability: tuple[int, int] = (8, 0), nccl: bool = True, answers: bool = True) -> None:
    """Two GPUs that are not there."""

    def memory(index: int) -> tuple[int, int]:
        if not answers:
            raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")
        return 70 * GIB, 80 * GIB

    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "get_device_capability": lambda index: capability,
        "get_device_name": lambda index: "A100",
        "mem_get_info": memory,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def no_gpu(monkeypatch: Patch, *, device: Path = Path("/nowhere")) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "NVIDIA", device)


def program(monkeypatch: Patch, code: int, output: str = "", error: str = "") -> None:
    """Any other program that is started ends so."""
    done = SimpleNamespace(returncode=code, stdout=output, stderr=error)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def has(finding: CheckResult, level: str, *words: str) -> None:
    """What is wrong is told with how to mend it, on one line; what is well needs no mending."""
    assert finding.level == level, finding
    assert bool(finding.fix) == (level != "ok"), finding
    text = f"{finding.found}; {finding.fix}"
    assert "\n" not in text
    for word in words:
        assert word in text


def test_python(monkeypatch: Patch) -> None:
    has(doctor.check_python(), "ok", sys.executable)
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    has(doctor.check_python(), "error", "Python 3.10.4: must be 3.11 or newer", "PYTHON=python3.11")


def test_packages(monkeypatch: Patch) -> None:
    lines = ["torch>=2.10,<3", "timm>=99", "no-such-thing>=1", "neither-this; extra == 'hf'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    found = doctor.check_packages()
    has(found, "error", f"timm {metadata.version('timm')}: must be >=99", "no-such-thing is missing", "pip install")
    assert "torch" not in found.found
    assert "neither" not in found.found
    monkeypatch.setattr(metadata, "requires", lambda name: lines[:1])
    has(doctor.check_packages(), "ok")


def test_torch(monkeypatch: Patch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)
    has(doctor.check_torch(), "ok", torch.__version__)
    no_gpu(monkeypatch, device=tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    has(doctor.check_torch(), "error", "built for the CPU alone, but there is a GPU", "install a CUDA build")


def test_cuda(monkeypatch: Patch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)
    has(doctor.check_cuda(), "warning", "no GPU: runs compute on the CPU")
    no_gpu(monkeypatch, device=tmp_path)
    has(doctor.check_cuda(), "error", "there is a GPU, but torch", "update the driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    has(doctor.check_cuda(), "warning", "CUDA_VISIBLE_DEVICES = ''", "unset CUDA_VISIBLE_DEVICES")
    gpus(monkeypatch)
    has(doctor.check_cuda(), "ok", "A100 (70 of 80 GiB free), A100")
    gpus(monkeypatch, capability=(7, 0))
    has(doctor.check_cuda(), "error", "GPU 0 (A100, sm_70): torch is built for sm_80, sm_90", "hide it")
    gpus(monkeypatch, answers=False)
    has(doctor.check_cuda(), "error", "does not answer: CUDA error: uncorrectable ECC error", "nvidia-smi")


def test_nccl(monkeypatch: Patch) -> None:
    no_gpu(monkeypatch)
    has(doctor.check_nccl(), "ok", "gloo")
    gpus(monkeypatch)
    has(doctor.check_nccl(), "ok", "NCCL 2.29.3")
    gpus(monkeypatch, nccl=False)
    has(doctor.check_nccl(), "error", "torch has no NCCL for 2 GPUs")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    has(doctor.check_nccl(), "error", "without torch.distributed")


def test_attention(monkeypatch: Patch) -> None:
    no_gpu(monkeypatch)
    has(doctor.check_attention(), "ok", "bf16 has sdpa, eager, sdpa_flash")
    gpus(monkeypatch)

    def math_alone(kernel: str, *_: object) -> None:
        if kernel != "sdpa_efficient":
            raise doctor.UserError("not here")

    monkeypatch.setattr("dist_vpt.runtime.attention.refuse_missing", math_alone)
    has(doctor.check_attention(), "warning", "no flash kernel on this GPU, only eager, sdpa_efficient", "sm_80")


def test_deepspeed(monkeypatch: Patch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    program(monkeypatch, 1, error="Traceback\nImportError: no nvcc\n")
    has(doctor.check_deepspeed(), "error", "cannot be imported: ImportError: no nvcc", "ddp works without it")
    program(monkeypatch, 0)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    has(
        doctor.check_deepspeed(), "warning", "is not built, and c++ and ninja is missing", "apt install g++ ninja-build"
    )
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    has(doctor.check_deepspeed(), "ok", "is built at the first start")
    (tmp_path / "deepspeed_shm_comm_op").mkdir()
    (tmp_path / "deepspeed_shm_comm_op" / "deepspeed_shm_comm_op.so").touch()
    has(doctor.check_deepspeed(), "ok", f"its op for CPUs is built ({tmp_path})")
    gpus(monkeypatch)
    has(doctor.check_deepspeed(), "ok", "nothing built on a GPU")


def test_accelerate(monkeypatch: Patch, tmp_path: Path) -> None:
    no_gpu(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    has(doctor.check_accelerate(), "ok", "no config of your own")
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("num_processes: 4\n")
    has(doctor.check_accelerate(), "ok", str(file))
    gpus(monkeypatch)
    has(
        doctor.check_accelerate(),
        "warning",
        f"{file}: num_processes = 4, but this machine has 2 GPUs",
        "launch/local.sh",
    )
    file.write_text("num_processes: [\n")
    has(doctor.check_accelerate(), "warning", f"{file} is not a config", "accelerate config")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    has(doctor.check_accelerate(), "warning", "RANK=0 WORLD_SIZE=2 in this shell", "unset RANK WORLD_SIZE")


def test_run_folder(monkeypatch: Patch, tmp_path: Path) -> None:
    below = tmp_path / "runs" / "mine"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, 50 * GIB))
    has(doctor.check_run_folder(below), "ok", f"{tmp_path}: 50.0 GiB free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, 5 * GIB))
    has(doctor.check_run_folder(below), "warning", "5.0 GiB free", "make room")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 0, GIB // 2))
    has(doctor.check_run_folder(below), "error", "0.5 GiB free", "make room")
    full = SimpleNamespace(f_files=1000, f_favail=3)
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    has(doctor.check_run_folder(below), "error", "no more than 3 files can be made (inodes)")
    assert not list(tmp_path.iterdir())  # nothing is left, and nothing was made
    file = tmp_path / "file"
    file.touch()
    has(doctor.check_run_folder(file / "runs"), "error", f"{file} is not a folder")


def test_a_run_folder_that_cannot_be_locked_or_written(monkeypatch: Patch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    has(doctor.check_run_folder(tmp_path), "error", "has no locks: Operation not supported", "-o flock")
    monkeypatch.setattr(os, "access", lambda path, how: False)
    has(doctor.check_run_folder(tmp_path), "error", f"{tmp_path} cannot be written: ", "mend its rights")


def test_write_speed(monkeypatch: Patch, tmp_path: Path) -> None:
    has(doctor.check_write_speed(tmp_path), "ok", f"MiB/s in {tmp_path}")
    ticks = iter((0.0, 8.0, 0.0))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks))
    has(doctor.check_write_speed(tmp_path), "warning", f"4 MiB/s in {tmp_path}", "run.save_every")
    assert not list(tmp_path.iterdir())

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    has(doctor.check_write_speed(tmp_path), "error", f"cannot be written to {tmp_path}: No space left", "make room")


def test_shared_memory(monkeypatch: Patch, tmp_path: Path) -> None:
    for free, level, word in (
        (8 * GIB, "ok", "8.0 of 8.0 GiB"),
        (GIB // 2, "warning", "little"),
        (2**25, "error", "32 MiB free in"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(8 * GIB, 0, free))
        has(doctor.check_shared_memory(), level, word)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    has(doctor.check_shared_memory(), "error", "is missing", "--shm-size", "data.workers=0")


def test_open_files(monkeypatch: Patch) -> None:
    for soft, hard, level, word in (
        (1024, 4096, "ok", "1,024 may be open"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", "any number"),
        (512, resource.RLIM_INFINITY, "warning", "ulimit -n 4096"),
        (512, 2048, "warning", "ulimit -n 2048"),
        (100, 100, "error", "limits.conf"),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda what, pair=(soft, hard): pair)
        has(doctor.check_open_files(), level, word)


def test_slurm(monkeypatch: Patch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    has(doctor.check_slurm(), "ok", "not here")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    program(monkeypatch, 0, "gpu*  4 nodes idle\ncpu 2 nodes mixed\n")
    has(doctor.check_slurm(), "ok", "gpu* 4 nodes idle, cpu 2 nodes mixed; this is within job 17")
    program(monkeypatch, 0, "\n")
    has(doctor.check_slurm(), "warning", "no partition for you")
    program(monkeypatch, 1, error="sinfo: error: Unable to contact slurm controller\nmore")
    has(doctor.check_slurm(), "warning", "Slurm does not answer: sinfo: error: Unable to contact", "slurmctld")


def test_extras(monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "wandb" else object())
    has(doctor.check_extras(), "ok", "installed: hf, tfds, prepare, flash, int8", "pip install 'dist-vpt[wandb]'")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    has(doctor.check_extras(), "ok", "installed: none")


def quick(monkeypatch: Patch, **findings: Callable[[], CheckResult]) -> None:
    monkeypatch.setattr(doctor, "checks", lambda run_dir: findings)


def fine() -> CheckResult:
    return CheckResult("ok", "all is well")


def odd() -> CheckResult:
    return CheckResult("warning", "this is slow", "use another")


def broken() -> CheckResult:
    raise ImportError("libcudart.so: cannot open\nmore")


def test_exit_codes_and_lines(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    quick(monkeypatch, one=fine, two=odd)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == ["ok      one: all is well", "warning two: this is slow; use another"]
    assert told[2:] == ["2 checks: 1 warning, no errors"]
    quick(monkeypatch, one=broken, two=odd, three=fine)  # the others go on
    assert main(["doctor"]) == 2
    out, error = capsys.readouterr()
    assert out.splitlines()[0].startswith(
        "error   one: the check itself failed: ImportError: libcudart.so: cannot open;"
    )
    assert out.splitlines()[2:] == ["ok      three: all is well", "3 checks: 1 warning, 1 error"]
    assert error == "error: doctor: one: must be mended before a run; how is said above\n"


def test_json(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    quick(monkeypatch, one=fine, two=broken)
    assert main(["doctor", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert (told["errors"], told["warnings"]) == (1, 0)
    assert told["checks"][0] == {"check": "one", "level": "ok", "found": "all is well", "fix": ""}
    assert told["checks"][1]["level"] == "error"


def test_all_checks_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    program(monkeypatch, 0, "main 1 nodes idle")  # of DeepSpeed's import, which takes long, and Slurm
    code = main(["doctor", "--run-dir", str(tmp_path), "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [one["check"] for one in told["checks"]] == list(doctor.checks(tmp_path))
    assert not [one for one in told["checks"] if "itself failed" in one["found"]]
    assert code == (2 if told["errors"] else 0)


@pytest.mark.parametrize("columns", [40, 120])
def test_a_terminal_shows_all_words_within_its_width(columns: int, monkeypatch: Patch) -> None:
    found = {
        "shared memory": CheckResult("error", "32 MiB free in /dev/shm: loader workers die", "docker run --shm-size=8g")
    }
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stdout", screen)
        doctor.show(found)
        screen.flush()
        shown = os.read(ours, 10_000).decode()
    os.close(ours)
    plain = shown.replace("\x1b[1;31m", "").replace("\x1b[0m", "")
    lines = [line.rstrip() for line in plain.splitlines()]
    assert max(map(len, lines)) <= columns
    assert len(lines) == (1 if columns == 120 else len(lines))
    words = " ".join(" ".join(lines).split())
    for word in ("error", "shared memory", "32", "loader", "workers", "die;", "docker", "--shm-size=8g"):
        assert word in words

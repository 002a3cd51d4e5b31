"""``dist-vpt doctor``: what on this machine would keep a run from starting, slow it down or end it, and how to mend it.

Each check is a function that looks at one thing and returns one finding; what it needs is imported by it, so that
a broken package is found rather than met. Errors are what no run, or no run of this kind, can do with; warnings are
what runs can live with.
"""

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from dist_vpt.distributed.launch_env import LaunchEnv, leftover_variables
from dist_vpt.errors import UserError

MIB, GIB = 2**20, 2**30
PYTHON = (3, 11)
NVIDIA = Path("/dev/nvidia0")  # the first GPU, as its driver shows it
SHARED_MEMORY = Path("/dev/shm")
WRITTEN = 32 * MIB  # bytes of the trial file
SLOW = 20  # MiB/s: a state of some hundred MiB would hold training up for more than ten seconds
EXTRAS = {
    "hf": ("datasets",),
    "tfds": ("tensorflow_datasets", "array_record", "simplejpeg", "crc32c"),
    "prepare": ("tensorflow",),
    "wandb": ("wandb",),
    "flash": ("flash_attn",),
    "int8": ("torchao",),
}


@dataclass(frozen=True)
class CheckResult:
    """What one check found."""

    level: str  # ok, warning or error
    found: str  # what is there, or what is wrong
    fix: str = ""  # of what is wrong


def doctor(run_dir: str, *, as_json: bool) -> None:
    """Print what every check found. Raises UserError where one found an error."""
    found = dict(examine(run_dir))
    failed = [name for name, one in found.items() if one.level == "error"]
    warned = [name for name, one in found.items() if one.level == "warning"]
    if as_json:
        checks = [{"check": name, **asdict(one)} for name, one in found.items()]
        print(json.dumps({"errors": len(failed), "warnings": len(warned), "checks": checks}, indent=1))
    else:
        show(found)
        print(f"{len(found)} checks: {_count(len(warned), 'warning')}, {_count(len(failed), 'error')}")
    if failed:
        raise UserError(f"doctor: {', '.join(failed)}: must be mended before a run; how is said above")


def examine(run_dir: str) -> Iterator[tuple[str, CheckResult]]:
    """Name and finding of every check, in order. A check that fails itself is a finding too."""
    for name, check in checks(Path(run_dir)).items():
        try:
            yield name, check()
        except Exception as error:  # a broken installation breaks in any way; the other checks go on
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            yield (
                name,
                CheckResult("error", f"the check itself failed: {text}", "install anew: make setup, or pip install"),
            )


def checks(run_dir: Path) -> dict[str, Callable[[], CheckResult]]:
    """By the name that is printed."""
    return {
        "python": check_python,
        "packages": check_packages,
        "torch": check_torch,
        "cuda": check_cuda,
        "nccl": check_nccl,
        "attention": check_attention,
        "deepspeed": check_deepspeed,
        "accelerate": check_accelerate,
        "run folder": lambda: check_run_folder(run_dir),
        "write speed": lambda: check_write_speed(run_dir),
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "slurm": check_slurm,
        "extras": check_extras,
    }


def show(found: dict[str, CheckResult]) -> None:
    """A line each, folded to the width of a terminal; whole where the output goes elsewhere."""
    if not sys.stdout.isatty():
        for name, one in found.items():
            print(f"{one.level:<7} {name}: {_text(one)}")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for fixed in (True, True, False):
        table.add_column(no_wrap=fixed, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    for name, one in found.items():
        table.add_row(Text(one.level, colours[one.level]), name, Text(_text(one)))
    Console(highlight=False).print(table)


def _text(one: CheckResult) -> str:
    return f"{one.found}; {one.fix}" if one.fix else one.found


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def check_python() -> CheckResult:
    """New enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < PYTHON:
        return CheckResult("error", f"Python {version}: must be 3.11 or newer", "make clean setup PYTHON=python3.11")
    return CheckResult("ok", f"{version}, {sys.executable}")


def check_packages() -> CheckResult:
    """All that the package requires, in versions that it was made for."""
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("dist-vpt") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version}: must be {wanted.specifier}")
    if wrong:
        return CheckResult("error", "; ".join(wrong), "pip install dist-vpt again, in this environment")
    return CheckResult("ok", "all that is required is installed, in versions that fit")


def check_torch() -> CheckResult:
    """It can be imported, and computes."""
    import torch

    torch.ones(2, 2) @ torch.ones(2, 2)
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
    if NVIDIA.exists() and not torch.version.cuda:
        return CheckResult(
            "error", f"{torch.__version__} is {built}, but there is a GPU", "install a CUDA build of torch"
        )
    return CheckResult("ok", f"{torch.__version__}, {built}, {_count(torch.get_num_threads(), 'thread')}")


def check_cuda() -> CheckResult:
    """Every GPU that is there can be used."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        if hidden is not None and (NVIDIA.exists() or hidden.strip() in {"", "-1"}):
            said = f"no GPU can be used: CUDA_VISIBLE_DEVICES = {hidden!r}"
            return CheckResult("warning", said, "unset CUDA_VISIBLE_DEVICES, or name GPUs that nvidia-smi lists")
        if NVIDIA.exists():
            said = f"there is a GPU, but torch {torch.__version__} cannot use it"
            return CheckResult("error", said, "update the driver (nvidia-smi shows its CUDA version), or take a torch "
                           "that is built for an older CUDA")  # fmt: skip
        return CheckResult(
            "warning", "no GPU: runs compute on the CPU", "go to a machine with a GPU for large backbones"
        )
    known, names = torch.cuda.get_arch_list(), []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        if not any(arch.startswith(f"sm_{major}") for arch in known):
            said = f"GPU {index} ({name}, sm_{major}{minor}): torch is built for {', '.join(known)}"
            return CheckResult(
                "error", said, "install a torch that is built for this GPU, or hide it (CUDA_VISIBLE_DEVICES)"
            )
        try:
            free, whole = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            said = f"GPU {index} ({name}) does not answer: {str(error).splitlines()[0]}"
            return CheckResult("error", said, "see nvidia-smi; hide it with CUDA_VISIBLE_DEVICES until it is mended")
        names.append(f"{name} ({free / GIB:.0f} of {whole / GIB:.0f} GiB free)")
    return CheckResult("ok", ", ".join(names))


def check_nccl() -> CheckResult:
    """What several processes exchange through."""
    import torch
    from torch import distributed

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not distributed.is_available():
        return CheckResult("error", "torch is built without torch.distributed", "install a torch that has it")
    if gpus and not distributed.is_nccl_available():
        level = "error" if gpus > 1 else "warning"
        return CheckResult(
            level, f"torch has no NCCL for {_count(gpus, 'GPU')}", "install torch's own CUDA build for Linux"
        )
    if gpus:
        return CheckResult("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return CheckResult("ok", "not needed without a GPU: processes exchange through gloo")


def check_attention() -> CheckResult:
    """Which kernels ``runtime.attention`` can have here."""
    import torch

    from dist_vpt.runtime.attention import BACKENDS, AttentionScores, refuse_missing

    cpu = not torch.accelerator.is_available()
    there = []
    for kernel in BACKENDS:
        try:
            if kernel != "flash":  # of a package: extras
                refuse_missing(kernel, torch.bfloat16, cpu, {AttentionScores(width=64)})
                there.append(kernel)
        except UserError:
            continue
    if not cpu and "sdpa_flash" not in there:
        said = f"bf16 has no flash kernel on this GPU, only {', '.join(['eager', *there])}"
        return CheckResult("warning", said, "runs work, but slower and with more memory; newer GPUs (sm_80 on) have it")
    return CheckResult("ok", f"bf16 has {', '.join(['sdpa', 'eager', *there])}")


def check_deepspeed() -> CheckResult:
    """It can be imported, and what it builds at its first start is there or can be built."""
    import torch

    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed"], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        return CheckResult("error", f"cannot be imported: {reason}", "pip install dist-vpt again; ddp works without it")
    version = metadata.version("deepspeed")
    if torch.accelerator.is_available():
        return CheckResult("ok", f"{version}; our strategies need nothing built on a GPU")
    if any(extensions().glob("**/deepspeed_shm_comm*/*.so")):
        return CheckResult("ok", f"{version}; its op for CPUs is built ({extensions()})")
    compiler = os.environ.get("CXX", "c++")
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    missing = [name for name, there in ((compiler, shutil.which(compiler)), ("ninja", ninja)) if not there]
    if missing:
        said = f"{version}; its op for CPUs is not built, and {' and '.join(missing)} is missing"
        return CheckResult("warning", said, "install g++ and ninja (apt install g++ ninja-build); ddp works without")
    return CheckResult("ok", f"{version}; its op for CPUs is built at the first start, which takes a minute or two")


def extensions() -> Path:
    """Where torch keeps what it builds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def check_accelerate() -> CheckResult:
    """Nothing that a launcher or ``accelerate config`` has left behind changes what a run is told."""
    import torch
    import yaml

    left = [f"{name}={value}" for name, value in leftover_variables().items()]
    if left:
        said = f"{' '.join(left)} in this shell: a run takes itself for one of a launcher's processes"
        return CheckResult("warning", said, f"unset {' '.join(word.partition('=')[0] for word in left)}")
    file = config_file()
    version = metadata.version("accelerate")
    if not file.exists():
        return CheckResult("ok", f"{version}; no config of your own, and launch/accelerate has those that are needed")
    try:
        told = yaml.safe_load(file.read_text())
        processes = int(told.get("num_processes", 1))
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):
        return CheckResult("warning", f"{file} is not a config", "remove it, or run accelerate config")
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if gpus and processes > gpus:
        said = f"{file}: num_processes = {processes}, but this machine has {_count(gpus, 'GPU')}"
        return CheckResult("warning", said, "start with launch/local.sh, or with --num_processes")
    return CheckResult("ok", f"{version}; {file} counts where accelerate launch gets no --config_file")


def config_file() -> Path:
    """Where ``accelerate config`` writes."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(home).expanduser() / "accelerate" / "default_config.yaml"


def check_run_folder(run_dir: Path) -> CheckResult:
    """Runs can write, lock and rename there, and there is room."""
    there = existing(run_dir)
    if not there.is_dir():
        return CheckResult("error", f"{there} is not a folder", "name another with --run-dir (run.dir of a recipe)")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        what = "cannot be written" if not os.access(there, os.W_OK) else "cannot be written or has no locks"
        said = f"{there} {what}: {error.strerror or error}"
        return CheckResult("error", said, "fix its rights, mount it with locks (Lustre: -o flock) or take another with "
                       "--run-dir (run.dir of a recipe)")  # fmt: skip
    free = shutil.disk_usage(there).free
    files = os.statvfs(there)
    said = f"{there}: {free / GIB:,.1f} GiB free"
    fix = "make room, or name a folder on another disk (run.dir of a recipe)"
    if files.f_files and files.f_favail < 1000:
        return CheckResult("error", f"{there}: no more than {files.f_favail} files can be made (inodes)", fix)
    if free < GIB:
        return CheckResult("error", f"{said}: a run with method full would not fit", fix)
    return (
        CheckResult("warning", f"{said}: little for states of method full", fix)
        if free < 10 * GIB
        else CheckResult("ok", said)
    )


def check_write_speed(run_dir: Path) -> CheckResult:
    """Bytes that reach the disk itself in a second: saved states wait for that."""
    there = existing(run_dir)
    block = os.urandom(MIB)  # some disks write zeros for nothing
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            began = time.perf_counter()
            for _ in range(WRITTEN // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / MIB / (time.perf_counter() - began)
    except OSError as error:
        said = f"{WRITTEN // MIB} MiB cannot be written to {there}: {error.strerror or error}"
        return CheckResult("error", said, "make room and mend its rights, or name another with --run-dir")
    said = f"{speed:,.0f} MiB/s in {there}"
    if speed < SLOW:
        return CheckResult("warning", f"{said}: saved states hold training up", "use a faster disk, or save less often "
                       "(run.save_every)")  # fmt: skip
    return CheckResult("ok", said)


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_shared_memory() -> CheckResult:
    """Workers hand images over through it; where it is full they die of a bus error."""
    fix = "give the container more (docker run --shm-size=8g, or --ipc=host), or set data.workers=0"
    if not SHARED_MEMORY.is_dir():
        return CheckResult("error", f"{SHARED_MEMORY} is missing: loader workers cannot start", fix)
    usage = shutil.disk_usage(SHARED_MEMORY)
    said = f"{usage.free / GIB:,.1f} of {usage.total / GIB:,.1f} GiB free in {SHARED_MEMORY}"
    if usage.free <= 64 * MIB:
        said = f"{usage.free / MIB:,.0f} MiB free in {SHARED_MEMORY}"
        return CheckResult("error", f"{said}: loader workers die of a bus error", fix)
    return (
        CheckResult("warning", f"{said}: little for loader workers", fix)
        if usage.free < GIB
        else CheckResult("ok", said)
    )


def check_open_files() -> CheckResult:
    """Each batch on its way from a worker holds files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 1024:
        return CheckResult("ok", f"{'any number' if soft == resource.RLIM_INFINITY else f'{soft:,}'} may be open")
    most = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    fix = f"ulimit -n {most}" if most >= 1024 else "ask for more in /etc/security/limits.conf (nofile)"
    return CheckResult("error" if soft < 256 else "warning", f"{soft} may be open: workers may run out of them", fix)


def check_slurm() -> CheckResult:
    """Whether this is a cluster, and whether it answers."""
    if not shutil.which("sbatch"):
        return CheckResult("ok", "not here; only launch scripts for clusters need it")
    job = LaunchEnv.current().slurm.job_id
    within = f"; this is within job {job}" if job else ""
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %D nodes %T"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return CheckResult(
            "warning", f"sinfo does not answer: {error}", "ask whether slurmctld runs; without Slurm all else works"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        return CheckResult(
            "warning", f"Slurm does not answer: {reason}", "ask whether slurmctld runs; without Slurm all else works"
        )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines() if line.strip()]
    if not lines:
        return CheckResult("warning", "Slurm has no partition for you", "ask for an account on one")
    return CheckResult("ok", f"{', '.join(lines)}{within}")


def check_extras() -> CheckResult:
    """Optional packages; nothing of them is an error, since what needs one says so."""
    there = {extra: all(find_spec(name) for name in names) for extra, names in EXTRAS.items()}
    installed = ", ".join(extra for extra, has in there.items() if has) or "none"
    missing = [extra for extra, has in there.items() if not has]
    more = f"; where needed: pip install 'dist-vpt[{','.join(missing)}]'" if missing else ""
    return CheckResult("ok", f"installed: {installed}{more}")

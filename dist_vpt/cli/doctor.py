"""``dist-vpt doctor``: find what would stop a run on this machine, and how to fix it.

Each check is a function that looks at one thing and imports what it needs itself, so that a broken package is a result
of one check. An error stops every run, or every run of one kind; runs work with a warning.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from dist_vpt.errors import UserError

MIB, GIB = 2**20, 2**30
GPU_DEVICE = Path("/dev/nvidia0")  # the first GPU, as its driver shows it
SHARED_MEMORY = Path("/dev/shm")
EXTRAS = {
    "hf": ("datasets",),
    "parquet": ("pyarrow",),
    "tfds": ("tensorflow_datasets", "array_record", "simplejpeg", "crc32c"),
    "prepare": ("tensorflow",),
    "wandb": ("wandb",),
    "flash": ("flash_attn.cute",),  # flash-attn 2 alone has flash_attn too, and torch cannot use it
    "int8": ("torchao",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "mlflow": ("mlflow",),
    "optuna": ("optuna",),
    "peft": ("peft",),
}
FLASH_PACKAGES = ("flash_attn.cute", "flash_attn_interface")  # FlashAttention-4 and 3


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    level: str  # ok, warning or error
    found: str  # what is there, or what is wrong
    fix: str = ""  # of what is wrong


def doctor(run_dir: str, *, as_json: bool) -> None:
    """Print the results of all checks. Raises UserError where one is an error."""
    results = {name: _run(check) for name, check in checks(Path(run_dir)).items()}
    failed = [name for name, result in results.items() if result.level == "error"]
    warned = [name for name, result in results.items() if result.level == "warning"]
    if as_json:
        listed = [{"check": name, **asdict(result)} for name, result in results.items()]
        print(json.dumps({"errors": len(failed), "warnings": len(warned), "checks": listed}, indent=1))
    else:
        for name, result in results.items():
            print(f"{result.level:<7} {name}: {result.found}{f'; {result.fix}' if result.fix else ''}")
        print(f"{len(results)} checks, warnings: {len(warned)}, errors: {len(failed)}")
    if failed:
        raise UserError(f"doctor: {', '.join(failed)}: fix what is listed above before a run")


def checks(run_dir: Path) -> dict[str, Callable[[], CheckResult]]:
    """By the name that is printed."""
    return {
        "packages": check_packages,
        "gpu": check_gpu,
        "precision": check_precision,
        "launcher": check_launcher,
        "collectives": check_collectives,
        "deepspeed": check_deepspeed,
        "run folder": lambda: check_run_folder(run_dir),
        "shared memory": check_shared_memory,
        "flash attention": check_flash,
        "extras": check_extras,
    }


def _run(check: Callable[[], CheckResult]) -> CheckResult:
    try:
        return check()
    except Exception as error:  # a broken installation fails in any way; the other checks go on
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return CheckResult("error", f"the check itself failed: {message}", "reinstall: make setup, or pip install")


def check_packages() -> CheckResult:
    """All required packages, in supported versions."""
    from packaging.requirements import Requirement

    wrong = []
    for line in metadata.requires("dist-vpt") or []:
        required = Requirement(line)
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(required.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{required.name} is missing")
            continue
        if not required.specifier.contains(version, prereleases=True):
            wrong.append(f"{required.name} {version}: must be {required.specifier}")
    python = f"Python {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if wrong:
        return CheckResult("error", f"{python}: {'; '.join(wrong)}", "pip install dist-vpt again, in this environment")
    return CheckResult("ok", f"{python} has all required packages in supported versions")


def check_gpu() -> CheckResult:
    """torch computes on every GPU."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    built = f"torch {torch.__version__}, built for {cuda}"
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and (GPU_DEVICE.exists() or hidden.strip() in {"", "-1"}):
            fix = "unset CUDA_VISIBLE_DEVICES, or name GPUs that nvidia-smi lists"
            return CheckResult("warning", f"{built}: no GPU is visible: CUDA_VISIBLE_DEVICES = {hidden!r}", fix)
        if GPU_DEVICE.exists():
            fix = "install a torch that is built for the driver's CUDA version (nvidia-smi), or update the driver"
            return CheckResult("error", f"{built}: cannot use the GPU of this machine", fix)
        fix = "use a machine with a GPU for large backbones"
        return CheckResult("warning", f"{built}: no GPU, runs compute on the CPU", fix)
    names = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(2, 2, device=f"cuda:{index}").sum().item()
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # such as: no kernel image is available, uncorrectable ECC error
            fix = "see nvidia-smi; install a torch that is built for this GPU, or hide it (CUDA_VISIBLE_DEVICES)"
            return CheckResult("error", f"{built}: GPU {index} ({name}): {str(error).splitlines()[0]}", fix)
        names.append(f"{name} ({free / GIB:.0f} of {total / GIB:.0f} GiB free)")
    return CheckResult("ok", f"{built}: {', '.join(names)}")


def check_precision() -> CheckResult:
    """What runtime.precision=auto comes to here."""
    import torch

    from dist_vpt.runtime.cpu_speed import use_faster_products
    from dist_vpt.runtime.precision import choose_precision

    try:
        name, reason = choose_precision(cpu=False)
    except UserError as error:  # a launcher's variables, which the next check names
        return CheckResult("warning", str(error), "fix the launcher's variables")
    products = "" if torch.accelerator.is_available() else use_faster_products()
    return CheckResult("ok", f"auto is {name}, {reason}" + (products and f"; float32 products are {products}"))


def check_launcher() -> CheckResult:
    """No variables of a launcher, with which a run would wait for other processes."""
    from dist_vpt.distributed.launch_env import leftover_variables

    found = leftover_variables()
    if found:
        listed = " ".join(f"{name}={value}" for name, value in found.items())
        message = f"{listed} in this shell: a run would wait for other processes of a launcher"
        return CheckResult("warning", message, f"unset {' '.join(found)}")
    return CheckResult("ok", "no variables of a launcher are set")


def check_collectives() -> CheckResult:
    """The backend of collective calls works: NCCL for GPUs, gloo for CPUs."""
    from dist_vpt.distributed.checks import try_collective

    try:
        return CheckResult("ok", f"{try_collective()} works")
    except (RuntimeError, ValueError) as error:
        fix = "name the network to use in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; runs on one process work"
        return CheckResult("error", f"a sum over processes fails: {str(error).splitlines()[0]}", fix)


def check_deepspeed() -> CheckResult:
    """DeepSpeed can be imported, and what it builds at its first start is there or can be built."""
    import torch

    from dist_vpt.distributed.checks import build_tools_missing, deepspeed_import_error, extensions_folder

    if reason := deepspeed_import_error():
        return CheckResult("error", f"cannot be imported: {reason}", "pip install dist-vpt again; DDP works without it")
    version, folder = metadata.version("deepspeed"), extensions_folder()
    if torch.accelerator.is_available():
        return CheckResult("ok", f"{version}; ZeRO needs nothing built on a GPU")
    if any(folder.glob("**/deepspeed_shm_comm*/*.so")):
        return CheckResult("ok", f"{version}; its op for CPUs is built ({folder})")
    if reason := _write_error(_existing(folder)):
        message, fix = f"{folder} cannot be written ({reason})", "set TORCH_EXTENSIONS_DIR to a writable folder"
    elif missing := build_tools_missing():
        message, fix = f"{' and '.join(missing)} not found", "install g++ and ninja (apt install g++ ninja-build)"
    else:
        return CheckResult("ok", f"{version}; its op for CPUs is built at the first start, which takes a minute or two")
    return CheckResult("warning", f"{version}; its op for CPUs cannot be built: {message}", f"{fix}; DDP works without")


def check_run_folder(run_dir: Path) -> CheckResult:
    """Runs can write and lock files there, and the disk has space."""
    folder = _existing(run_dir)
    if not folder.is_dir():
        return CheckResult("error", f"{folder} is not a folder", "name another with --run-dir (run.dir of a recipe)")
    if reason := _write_error(folder):
        fix = "fix its permissions, mount it with locks (Lustre: -o flock), or name another with --run-dir"
        return CheckResult("error", f"{folder}: files cannot be written and locked: {reason}", fix)
    files = os.statvfs(folder)
    message, fix = f"{folder}: {shutil.disk_usage(folder).free / GIB:,.1f} GiB free", "free space, or use another disk"
    if files.f_files and files.f_favail < 1000:
        return CheckResult("error", f"{folder}: only {files.f_favail} more files fit (inodes)", fix)
    if shutil.disk_usage(folder).free < GIB:
        return CheckResult("error", f"{message}: too little for a run with method full", fix)
    return CheckResult("ok", message)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _write_error(folder: Path) -> str:
    """Why a file cannot be written and locked there, or ""."""
    from dist_vpt.files import lock_nowait

    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            lock_nowait(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_shared_memory() -> CheckResult:
    """Loader workers pass images on through it; where it is full they die of a bus error."""
    fix = "give the container more (docker run --shm-size=8g, or --ipc=host), or set data.workers=0"
    if not SHARED_MEMORY.is_dir():
        return CheckResult("error", f"{SHARED_MEMORY} is missing: loader workers cannot start", fix)
    free = shutil.disk_usage(SHARED_MEMORY).free
    message = f"{free / MIB:,.0f} MiB free in {SHARED_MEMORY}"
    if free <= 64 * MIB:
        return CheckResult("error", f"{message}: loader workers die of a bus error", fix)
    if free < GIB:
        return CheckResult("warning", f"{message}: little for loader workers", fix)
    return CheckResult("ok", message)


def check_flash() -> CheckResult:
    """Whether runtime.attention=flash works here: a package that torch can use, and a GPU that it supports."""
    import torch

    from dist_vpt.runtime.attention import AttentionScores, activate_flash, restore_flash

    if not torch.cuda.is_available():
        return CheckResult("ok", "not on CPUs: runtime.attention=flash needs a GPU, and no recipe requires it")
    try:
        name = activate_flash(torch.bfloat16, {AttentionScores(64)}, cpu=False)
    except UserError as error:
        reason = str(error).removeprefix("runtime.attention = flash: ").partition("; pip install")[0]
        if any(map(_is_installed, FLASH_PACKAGES)):
            return CheckResult("warning", reason, "use runtime.attention=auto here, which needs no package")
        return CheckResult("ok", f"{reason}; runtime.attention=auto needs none")
    restore_flash()
    return CheckResult("ok", f"runtime.attention=flash is {name}, forward and backward")


def check_extras() -> CheckResult:
    """Optional packages, none of which is required: a command that needs one reports it."""
    there = {extra: all(map(_is_installed, names)) for extra, names in EXTRAS.items()}
    installed = ", ".join(extra for extra, found in there.items() if found) or "none"
    missing = ",".join(extra for extra, found in there.items() if not found)
    others = f"; others: pip install 'dist-vpt[{missing}]'" if missing else ""
    return CheckResult("ok", f"installed: {installed}{others}")


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # the package that it would be in is not there
        return False

"""Environment variables set by a launcher (accelerate launch, torchrun, srun); no other module reads them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from dist_vpt.errors import UserError

PROCESSES_PER_GPU = "DIST_VPT_PROCESSES_PER_GPU"  # set where each process sees one GPU only
REMOVED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by detach_from_launcher
ON, OFF = ("1", "y", "yes", "t", "true", "on"), ("0", "n", "no", "f", "false", "off")  # as Accelerate reads switches
LEFTOVERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class SlurmEnv:
    """The node of a Slurm job that this process runs on."""

    job_id: str | None = None
    node_name: str | None = None
    node_index: int = 0
    nodes: int = 1
    gpus: int = 0  # of this node that belong to the job
    cpus: int = 1  # likewise


@dataclass(frozen=True)
class LaunchEnv:
    """One process among those that a launcher has started; the defaults are those of a process started by hand."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    local_world_size: int | None = None  # processes on this machine, if the launcher sets it
    master_addr: str | None = None
    master_port: str | None = None  # as given: whoever uses it reports a wrong one
    launched: bool = False
    deepspeed: bool = False
    mixed_precision: str | None = None  # this and the next two: as given to accelerate launch
    grad_accum_steps: str | None = None
    gradient_clipping: str | None = None
    slurm: SlurmEnv = field(default_factory=SlurmEnv)
    processes_per_gpu: int | None = None  # that share this process's GPU, where other variables hide it

    @classmethod
    def current(cls) -> "LaunchEnv":
        """Of this process, now."""
        return cls.parse(os.environ)

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> "LaunchEnv":
        """From the variables of an environment. Raises UserError for one that no launcher writes."""
        for name in (name for name in environ if name.startswith("ACCELERATE_USE_")):
            if environ[name].lower() not in ON + OFF:
                raise UserError(
                    f"{name} = {environ[name]!r}: this variable of the environment, which a launcher sets, must be "
                    "true or false; unset it"
                )
        if environ.get("LOCAL_RANK") and not environ.get("RANK"):
            raise UserError(
                f"LOCAL_RANK = {environ['LOCAL_RANK']!r} is set in the environment, and RANK is not: a process of "
                "several has both; unset it"
            )
        return cls(
            rank=_number(environ, "RANK") or 0,
            world_size=_number(environ, "WORLD_SIZE") or 1,
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE"),
            processes_per_gpu=_number(environ, PROCESSES_PER_GPU),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=environ.get("MASTER_PORT"),
            launched=bool(environ.get("RANK")),
            deepspeed=environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ON,
            mixed_precision=environ.get("ACCELERATE_MIXED_PRECISION"),
            grad_accum_steps=environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
            gradient_clipping=environ.get("ACCELERATE_GRADIENT_CLIPPING"),
            slurm=SlurmEnv(
                job_id=environ.get("SLURM_JOB_ID"),
                node_name=environ.get("SLURMD_NODENAME"),
                node_index=_number(environ, "SLURM_NODEID") or 0,
                nodes=_number(environ, "SLURM_NNODES") or 1,
                gpus=_number(environ, "SLURM_GPUS_ON_NODE") or 0,
                cpus=_number(environ, "SLURM_CPUS_ON_NODE") or 1,
            ),
        )


ALONE = LaunchEnv()


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """A variable's value; None where it is not set or empty."""
    value = environ.get(name, "")
    try:
        return int(value) if value else None
    except ValueError:
        raise UserError(
            f"{name} = {value!r}: this variable of the environment, which a launcher sets, must be a whole number; "
            "unset it"
        ) from None


def leftover_variables() -> dict[str, str]:
    """Variables of a launcher that make a process started by hand take itself for one of several."""
    return {name: os.environ[name] for name in LEFTOVERS if name in os.environ}


def visible_devices() -> list[str]:
    """The GPUs that this process may use, each as CUDA_VISIBLE_DEVICES names it; opens no context."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device.strip() for device in listed.split(",") if device.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def detach_from_launcher(launch: LaunchEnv) -> LaunchEnv:
    """Make this process train alone, on the device that its launcher assigned to it; returns how it is launched now.

    Processes beyond the number of devices share them in turn. To be called before anything touches a device: CUDA
    reads which ones are visible once.
    """
    if launch.local_rank is not None and (devices := visible_devices()):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[launch.local_rank % len(devices)]
        os.environ[PROCESSES_PER_GPU] = str(-(-(launch.local_world_size or 1) // len(devices)))
    for name in [*REMOVED, *(name for name in os.environ if name.startswith("ACCELERATE_USE_"))]:
        os.environ.pop(name, None)
    return LaunchEnv.current()

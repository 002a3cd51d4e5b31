"""What a launcher (accelerate launch, torchrun, srun) sets in a process's environment; only this module reads it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

REMOVED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # by detach_from_launcher
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
    slurm: SlurmEnv = field(default_factory=SlurmEnv)

    @classmethod
    def current(cls) -> "LaunchEnv":
        """Of this process, now."""
        return cls.parse(os.environ)

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> "LaunchEnv":
        """From the variables of an environment."""
        local_rank, local_world_size = environ.get("LOCAL_RANK"), environ.get("LOCAL_WORLD_SIZE")
        return cls(
            rank=int(environ.get("RANK", "0")),
            world_size=int(environ.get("WORLD_SIZE", "1")),
            local_rank=None if local_rank is None else int(local_rank),
            local_world_size=None if local_world_size is None else int(local_world_size),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=environ.get("MASTER_PORT"),
            launched="RANK" in environ,
            deepspeed=environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
            slurm=SlurmEnv(
                job_id=environ.get("SLURM_JOB_ID"),
                node_name=environ.get("SLURMD_NODENAME"),
                node_index=int(environ.get("SLURM_NODEID", "0")),
                nodes=int(environ.get("SLURM_NNODES", "1")),
                gpus=int(environ.get("SLURM_GPUS_ON_NODE", "0")),
                cpus=int(environ.get("SLURM_CPUS_ON_NODE", "1")),
            ),
        )


def leftover_variables() -> dict[str, str]:
    """Variables of a launcher that make a process started by hand take itself for one of several."""
    return {name: os.environ[name] for name in LEFTOVERS if name in os.environ}


def detach_from_launcher() -> None:
    """Make this process train alone, on the device that its launcher assigned to it."""
    local_rank = LaunchEnv.current().local_rank
    if local_rank is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = [] if visible is None else visible.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank % len(devices)] if devices else str(local_rank)
    for name in [*REMOVED, *(name for name in os.environ if name.startswith("ACCELERATE_USE_"))]:
        os.environ.pop(name, None)

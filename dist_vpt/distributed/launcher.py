"""Accelerate's launcher on one node of a Slurm job, and the exit code that sums up those of its processes."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import ProcessFailed

EXIT_CODE_OFFSET = 160  # added to the exit code of a training process, above those that Slurm itself gives
KILLED = 94  # stands for the exit code of a process that a signal has ended


def launch_on_node(launch: LaunchEnv, strategy: Path, argv: Sequence[str]) -> int:
    """Start this node's processes of ``dist_vpt.train``, one per GPU, and wait for them; returns the exit code."""
    slurm, deepspeed_config = launch.slurm, strategy.with_suffix(".json")
    processes = max(slurm.gpus, 1)
    if not slurm.gpus and not deepspeed_config.is_file():  # DeepSpeed would be switched off by it
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, slurm.cpus // processes)))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    options = _options(launch, strategy, deepspeed_config, processes)
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", "dist_vpt.train", *argv]))
    except ChildFailedError as failed:
        return node_exit_code({rank: failure.exitcode for rank, failure in failed.failures.items()})
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _options(launch: LaunchEnv, strategy: Path, deepspeed_config: Path, processes: int) -> list[str]:
    options = {
        "config_file": strategy,
        "num_machines": launch.slurm.nodes,
        "machine_rank": launch.slurm.node_index,
        "num_processes": launch.slurm.nodes * processes,
        "main_process_ip": launch.master_addr,
        "main_process_port": launch.master_port,
        "rdzv_backend": "static",
    }
    if deepspeed_config.is_file():
        options |= {"deepspeed_config_file": deepspeed_config, "deepspeed_multinode_launcher": "standard"}
    return [*(text for name, value in options.items() for text in (f"--{name}", str(value))), "--same_network"]


def node_exit_code(codes: Mapping[int, int]) -> int:
    """One exit code from those of the node's processes by rank; negative ones are signals."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    for rank, number in killed.items():
        print(f"slurm: process {rank} was ended by signal {number} ({signal.strsignal(number)})", file=sys.stderr)
    if killed:
        return EXIT_CODE_OFFSET + KILLED
    # Processes that failed because of another one must not hide why that one failed.
    causes = [code for code in codes.values() if code > 0 and code != ProcessFailed.exit_code]
    highest = max(causes or codes.values())
    if highest < 0:
        return 128 - highest
    return EXIT_CODE_OFFSET + highest if EXIT_CODE_OFFSET + highest < 256 else highest

"""A node's part of a Slurm job: look for what usually goes wrong, then start the processes that train.

    python -m dist_vpt.cli.slurm_node check RECIPE... a.b=c
    python -m dist_vpt.cli.slurm_node gpus
    python -m dist_vpt.cli.slurm_node train launch/accelerate/STRATEGY.yaml RECIPE... a.b=c

launch/slurm.sh calls them on each node. Its step's exit code is the highest of all nodes', and a node that Slurm has
ended counts 128 and more; so what a training process itself told is raised above that.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_vpt.errors import ProcessFailed, UserError

NOTHING_LEFT = 60  # exit code of a check: the run is done already
TOLD = 160  # added to the exit code of a training process
KILLED = 94  # stands for that of one that a signal has ended


def main(words: Sequence[str] | None = None) -> int:
    """Check this node or train on it; returns the exit code."""
    command, *words = sys.argv[1:] if words is None else words
    if command == "check":
        return check(words, os.environ)
    if command == "gpus":
        return _tell(_too_few_gpus(os.environ), os.environ)
    return train(Path(words[0]), words[1:], os.environ)


def check(words: Sequence[str], told: Mapping[str, str]) -> int:
    """Tell what would keep the job from running here, each in a line; ``told``: Slurm's variables."""
    from dist_vpt.files import read_json
    from dist_vpt.recipe.loading import load_recipe, split_arguments
    from dist_vpt.runs.folder import RunFolder

    try:
        recipe = load_recipe(*split_arguments(words))
        folder = RunFolder(str(recipe.run.dir))
        if folder.holds(recipe, "run") and folder.status()["status"] == "done":
            read_json(folder.result)  # without it, the job has not succeeded
            print(f"{folder.path}: done already; its numbers are in {folder.result}")
            return NOTHING_LEFT
    except UserError as error:
        return _tell([str(error)], told)
    return _tell([*_unresolved(told), *_port_taken(told), *_too_few_gpus(told)], told)


def _tell(mistakes: Sequence[str], told: Mapping[str, str]) -> int:
    for mistake in mistakes:
        print(f"slurm: {told.get('SLURMD_NODENAME', socket.gethostname())}: {mistake}", file=sys.stderr)
    return UserError.exit_code if mistakes else 0


def _unresolved(told: Mapping[str, str]) -> list[str]:
    head = told["MASTER_ADDR"]
    try:
        socket.getaddrinfo(head, None)
    except OSError as error:
        return [
            f"the first node's name {head} cannot be resolved ({error.strerror}); "
            "give its address: MASTER_ADDR=... before sbatch"
        ]
    return []


def _port_taken(told: Mapping[str, str]) -> list[str]:
    port = told["MASTER_PORT"]
    if told.get("SLURM_NODEID", "0") != "0":  # the first node listens
        return []
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            tried.bind(("", int(port)))
    except (OSError, ValueError, OverflowError) as error:
        return [f"port {port} cannot be had ({error}); give a free one: MASTER_PORT=... before sbatch"]
    return []


def _too_few_gpus(told: Mapping[str, str]) -> list[str]:
    asked = int(told.get("SLURM_GPUS_ON_NODE", "0"))
    if not asked:
        return []
    import torch

    seen = torch.accelerator.device_count()
    if seen < asked:
        return [
            f"{asked} GPUs were asked for and torch sees {seen}; leave this node out (sbatch --exclude), or ask for "
            "fewer (--gpus-per-node)"
        ]
    return []


def train(strategy: Path, words: Sequence[str], told: Mapping[str, str]) -> int:
    """Start this node's processes with Accelerate's launcher, a process per GPU, and wait for their end."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it reaches the launcher too, and is meant for what it starts
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    nodes, gpus = int(told["SLURM_NNODES"]), int(told.get("SLURM_GPUS_ON_NODE", "0"))
    processes = max(gpus, 1)
    sharding = strategy.with_suffix(".json")
    if not gpus and not sharding.is_file():  # DeepSpeed would be switched off by it
        os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(told.get("SLURM_CPUS_ON_NODE", "1")) // processes)))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{told['PATH']}"  # DeepSpeed looks for ninja
    options = {
        "config_file": strategy,
        "num_machines": nodes,
        "machine_rank": told["SLURM_NODEID"],
        "num_processes": nodes * processes,
        "main_process_ip": told["MASTER_ADDR"],
        "main_process_port": told["MASTER_PORT"],
        "rdzv_backend": "static",
    }
    if sharding.is_file():
        options |= {"deepspeed_config_file": sharding, "deepspeed_multinode_launcher": "standard"}
    line = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    try:
        launch_command(launch_command_parser().parse_args([*line, "--same_network", "-m", "dist_vpt.train", *words]))
    except ChildFailedError as failed:
        return _code({rank: failure.exitcode for rank, failure in failed.failures.items()})
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _code(codes: Mapping[int, int]) -> int:
    """What this node's exit code tells of its processes', negative ones being signals."""
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    for rank, number in killed.items():
        print(f"slurm: process {rank} was ended by signal {number} ({signal.strsignal(number)})", file=sys.stderr)
    if killed:
        return TOLD + KILLED
    own = [code for code in codes.values() if code > 0 and code != ProcessFailed.exit_code]
    highest = max(own or codes.values())  # what the others met because of one must not hide why it failed
    if highest < 0:
        return 128 - highest
    return TOLD + highest if TOLD + highest < 256 else highest


if __name__ == "__main__":
    sys.exit(main())

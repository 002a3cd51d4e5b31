"""One node's part of a Slurm job: check for frequent mistakes, then start the processes that train.

    python -m dist_vpt.cli.slurm_node check RECIPE... a.b=c
    python -m dist_vpt.cli.slurm_node gpus
    python -m dist_vpt.cli.slurm_node train launch/accelerate/STRATEGY.yaml RECIPE... a.b=c

launch/slurm.sh calls them on each node. The exit code of its step is the highest of all nodes', and Slurm gives a node
that it has ended 128 or more; so the exit codes of training processes are raised above that (distributed/launcher.py).
"""

import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError

ALREADY_DONE = 60  # exit code of a check: nothing is left to do


def main(argv: Sequence[str] | None = None) -> int:
    """Check this node or train on it; returns the exit code."""
    command, *argv = sys.argv[1:] if argv is None else argv
    launch = LaunchEnv.current()
    if command == "check":
        return check(argv, launch)
    if command == "gpus":
        return _report(_too_few_gpus(launch), launch)
    # Before the slow imports: Slurm sends it to the launcher, too, but it is meant for the processes that train.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from dist_vpt.distributed.launcher import launch_on_node

    return launch_on_node(launch, Path(argv[0]), argv[1:])


def check(argv: Sequence[str], launch: LaunchEnv) -> int:
    """Report, one line each, what would keep the job from running on this node; returns the exit code."""
    from dist_vpt.files import read_json
    from dist_vpt.recipe.loading import load_recipe, split_arguments
    from dist_vpt.runs.folder import RunFolder

    try:
        recipe = load_recipe(*split_arguments(argv))
        folder = RunFolder(str(recipe.run.dir))
        if folder.holds(recipe, "run") and folder.status()["status"] == "done":
            read_json(folder.result)  # without it, the job has not succeeded
            print(f"{folder.path}: done already; its numbers are in {folder.result}")
            return ALREADY_DONE
    except UserError as error:
        return _report([str(error)], launch)
    return _report([*_unresolved_address(launch), *_port_in_use(launch), *_too_few_gpus(launch)], launch)


def _report(mistakes: Sequence[str], launch: LaunchEnv) -> int:
    for mistake in mistakes:
        print(f"slurm: {launch.slurm.node_name or socket.gethostname()}: {mistake}", file=sys.stderr)
    return UserError.exit_code if mistakes else 0


def _unresolved_address(launch: LaunchEnv) -> list[str]:
    try:
        socket.getaddrinfo(launch.master_addr, None)
    except OSError as error:
        return [
            f"the first node's name {launch.master_addr} cannot be resolved ({error.strerror}); "
            "give its address: MASTER_ADDR=... before sbatch"
        ]
    return []


def _port_in_use(launch: LaunchEnv) -> list[str]:
    if launch.slurm.node_index:  # the first node listens
        return []
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
            listener.bind(("", int(launch.master_port or "")))
    except (OSError, ValueError, OverflowError) as error:
        return [f"port {launch.master_port} cannot be used ({error}); choose a free one: MASTER_PORT=... before sbatch"]
    return []


def _too_few_gpus(launch: LaunchEnv) -> list[str]:
    requested = launch.slurm.gpus
    if not requested:
        return []
    import torch

    available = torch.accelerator.device_count()
    if available < requested:
        return [
            f"{requested} GPUs were requested and torch sees {available}; exclude this node (sbatch --exclude), or "
            "request fewer (--gpus-per-node)"
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())

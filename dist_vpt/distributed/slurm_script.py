"""Job scripts for Slurm; they share the functions of launch/slurm.sh."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_vpt.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch"
LEAVES = 120  # seconds before its time limit at which Slurm signals a job to save


def job_script(
    writer: str,
    directives: Sequence[str],
    call: Sequence[str],
    attempts: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A job's script: options for sbatch, then a call of launch/slurm.sh with this Python in this folder."""
    shared = LAUNCH / "slurm.sh"
    if not shared.is_file():
        raise UserError(f"{shared}: not found; Slurm scripts need a clone of the repository (pip install -e CLONE)")
    common = ["--ntasks-per-node=1", f"--signal=B:USR1@{LEAVES}", "--requeue", "--open-mode=append"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in (*directives, *common)),
        f"# Written by {writer}. More options (partition, account, ...) may be given to sbatch, or as its variables",
        "# (SBATCH_PARTITION, SBATCH_ACCOUNT, ...). If started again, it continues.",
        *notes,
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        f"python={shlex.quote(sys.executable)}",
        *([f"ATTEMPTS={attempts}"] if attempts else []),
        f"source {shlex.quote(str(shared))} || exit 2",
        shlex.join(call),
    ]
    return "\n".join(lines) + "\n"

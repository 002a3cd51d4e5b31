"""The job scripts for Slurm; the functions that they call are in launch/slurm.sh."""

import os
import shlex
import sys
from collections.abc import Sequence

from dist_vpt.files import shipped_folder

SECONDS_TO_SAVE = 120  # before its time limit a job is asked to save and stop


def job_script(
    writer: str,
    directives: Sequence[str],
    command: Sequence[str],
    attempts: int | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A job's script: options for sbatch, then a function of launch/slurm.sh with this Python in this folder."""
    functions = shipped_folder("launch") / "slurm.sh"
    always = ["--ntasks-per-node=1", f"--signal=B:USR1@{SECONDS_TO_SAVE}", "--requeue", "--open-mode=append"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in (*directives, *always)),
        f"# Written by {writer}. More options (partition, account, ...) may be given to sbatch, or as its variables",
        "# (SBATCH_PARTITION, SBATCH_ACCOUNT, ...). If submitted again, it continues.",
        *notes,
        f"cd {shlex.quote(os.getcwd())} || exit 2",
        f"python={shlex.quote(sys.executable)}",
        *([f"ATTEMPTS={attempts}"] if attempts else []),
        f"source {shlex.quote(str(functions))} || exit 2",
        shlex.join(command),
    ]
    return "\n".join(lines) + "\n"

"""``dist-vpt launch slurm``, and the job scripts that it and a suite write. What they share lies in launch/slurm.sh."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vpt.distributed.slurm_script import LAUNCH, LEAVES, job_script
from dist_vpt.errors import UserError, nearest

if TYPE_CHECKING:
    from dist_vpt.recipe.schema import Recipe

TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # minutes, M:S, H:M:S; days-H, days-H:M, days-H:M:S
SHORTEST = 180  # seconds of an attempt that has time for anything


def slurm(
    words: Sequence[str], *, nodes: int, gpus: int, time: str, strategy: str, max_restarts: int, dry_run: bool
) -> None:
    """Write and submit a job that trains on ``nodes`` nodes with ``gpus`` processes each (0: one, on the CPU)."""
    from dist_vpt.files import write_atomically
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments(words))
    _check(recipe, nodes=nodes, gpus=gpus, time=time, strategy=strategy, max_restarts=max_restarts)
    run = Path(str(recipe.run.dir))
    here = max(gpus, 1)
    directives = [
        f"--job-name={_quoted(run.name)}",
        f"--nodes={nodes}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--cpus-per-task={here * (1 + recipe.data.workers)}",
        f"--time={time}",
        f"--output={_quoted(str(run).replace('%', '%%') + '-%j.log')}",
    ]
    notes = [f"# The log's folder must be there (Slurm makes none): mkdir -p {shlex.quote(str(run.parent))}"]
    text = job_script("dist-vpt launch slurm", directives, ["train_in_job", strategy, *words], max_restarts + 1, notes)
    if dry_run:
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found; call this where jobs are submitted from, or take the script there (--dry-run prints it)"
        )
    file = run.with_name(f"{run.name}.sbatch")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # Slurm itself makes no folder for a log
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another run.dir") from error
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{file}: refused by sbatch ({done.stderr.strip()}); mend it, or sbatch the file with options")
    job = done.stdout.strip().partition(";")[0]  # a federation names its cluster, too
    print(f"job {job} of {file}, log in {run}-{job}.log")


def _seconds(time: str) -> int:
    """Of a limit as sbatch takes it."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))


def _quoted(text: str) -> str:
    """As sbatch reads it, where a blank or # would end an option's value."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def _check(recipe: "Recipe", *, nodes: int, gpus: int, time: str, strategy: str, max_restarts: int) -> None:
    """Raise UserError for what the cluster would refuse, or the job after its turn has come."""
    known = [path.stem for path in (LAUNCH / "accelerate").glob("*.yaml")]
    if strategy not in known:
        raise UserError(f"--strategy {strategy}: no launch/accelerate/{strategy}.yaml; {nearest(strategy, known)}")
    for name, value, least in (("nodes", nodes, 1), ("gpus-per-node", gpus, 0), ("max-restarts", max_restarts, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not TIME.fullmatch(time):
        raise UserError(
            f"--time {time}: must be as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds"
        )
    if _seconds(time) < SHORTEST:
        raise UserError(
            f"--time {time}: must be {SHORTEST} seconds or more; an attempt saves and leaves {LEAVES} seconds before "
            "its end"
        )
    from dist_vpt.training.accelerator import unsupported_reason

    if reason := unsupported_reason(recipe, strategy):
        raise UserError(f"--strategy {strategy}: {reason}")
    parts = nodes * max(gpus, 1) * recipe.train.grad_accum_steps
    if recipe.train.batch_size % parts:
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {parts} = {nodes} nodes x "
            f"{max(gpus, 1)} processes x {recipe.train.grad_accum_steps} accumulated micro-batches"
        )

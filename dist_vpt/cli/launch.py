"""``dist-vpt launch slurm``: writes and submits a job script, whose functions are in launch/slurm.sh."""

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vpt.cli.arguments import add_command, add_group, add_recipe
from dist_vpt.distributed.slurm_script import SECONDS_TO_SAVE, job_script
from dist_vpt.errors import UserError, nearest
from dist_vpt.files import shipped_folder, write_atomically

if TYPE_CHECKING:
    from dist_vpt.recipe.schema import Recipe

TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # minutes, M:S, H:M:S; days-H, days-H:M, days-H:M:S
MIN_SECONDS = 180  # of one attempt: start-up and the time to save need as much


def add_parser(commands: Any) -> None:
    group = add_group(commands, "launch", "submit a training to a Slurm cluster")
    help = "write and submit a job that trains on any number of nodes"
    example = "dist-vpt launch slurm vpt_deep dtd sup_b16_in21k data.root=/data --gpus-per-node 4 --time 4:00:00"
    parser = add_command(group, "slurm", slurm, help, rest="recipe", example=example)
    add_recipe(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="GPUs per node (1); 0: use the CPUs")
    parser.add_argument(
        "--time", required=True, metavar="T", help="time limit of one attempt, as sbatch takes it: 4:00:00"
    )
    parser.add_argument(
        "--strategy", default="ddp", metavar="NAME", help="ddp (default), zero1, zero2, zero3 or zero3_offload"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=9, metavar="N", help="how often Slurm may restart the job (9)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, and submit nothing")


def slurm(arguments: argparse.Namespace) -> None:
    """Write and submit a job that trains with one process per GPU (without GPUs: one per node, on the CPU)."""
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    recipe = load_recipe(*split_arguments(arguments.recipe))
    _check(recipe, arguments)
    text = _job_script(recipe, arguments)
    if arguments.dry_run:
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found; run this on a node from which jobs are submitted, or copy the script there (--dry-run "
            "prints it)"
        )
    run = Path(str(recipe.run.dir))
    file = run.with_name(f"{run.name}.sbatch")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # Slurm creates no folder for a log
        write_atomically(file, text)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another run.dir") from error
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{file}: refused by sbatch ({done.stderr.strip()}); edit it, or sbatch the file with options")
    job = done.stdout.strip().partition(";")[0]  # a federation adds its cluster's name
    print(f"job {job} of {file}, log in {run}-{job}.log")


def _job_script(recipe: "Recipe", arguments: argparse.Namespace) -> str:
    run, gpus = Path(str(recipe.run.dir)), arguments.gpus_per_node
    directives = [
        f"--job-name={_quoted(run.name)}",
        f"--nodes={arguments.nodes}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--cpus-per-task={max(gpus, 1) * (1 + recipe.data.workers)}",
        f"--time={arguments.time}",
        f"--output={_quoted(str(run).replace('%', '%%') + '-%j.log')}",
    ]
    notes = [f"# The log's folder must exist (Slurm creates none): mkdir -p {shlex.quote(str(run.parent))}"]
    command = ["train_in_job", arguments.strategy, *arguments.recipe]
    return job_script("dist-vpt launch slurm", directives, command, arguments.max_restarts + 1, notes)


def _check(recipe: "Recipe", arguments: argparse.Namespace) -> None:
    """Raise UserError for what the cluster would refuse at once, or the job only after waiting in the queue."""
    strategy, time, nodes, gpus = arguments.strategy, arguments.time, arguments.nodes, arguments.gpus_per_node
    known = [path.stem for path in (shipped_folder("launch") / "accelerate").glob("*.yaml")]
    if strategy not in known:
        raise UserError(f"--strategy {strategy}: no such strategy; {nearest(strategy, known)}")
    for name, value, least in (
        ("nodes", nodes, 1),
        ("gpus-per-node", gpus, 0),
        ("max-restarts", arguments.max_restarts, 0),
    ):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not TIME.fullmatch(time):
        raise UserError(
            f"--time {time}: must be as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds"
        )
    if _seconds(time) < MIN_SECONDS:
        raise UserError(
            f"--time {time}: must be {MIN_SECONDS} seconds or more; an attempt stops to save {SECONDS_TO_SAVE} seconds "
            "before its end"
        )
    from dist_vpt.training.accelerator import unsupported_reason

    if reason := unsupported_reason(recipe, strategy):
        raise UserError(f"--strategy {strategy}: {reason}")
    divisor = nodes * max(gpus, 1) * recipe.train.grad_accum_steps
    if recipe.train.batch_size % divisor:
        raise UserError(
            f"train.batch_size = {recipe.train.batch_size}: must be a multiple of {divisor} = {nodes} nodes x "
            f"{max(gpus, 1)} processes x {recipe.train.grad_accum_steps} accumulated micro-batches"
        )


def _seconds(time: str) -> int:
    """A time limit as sbatch takes it, in seconds."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))


def _quoted(text: str) -> str:
    """A value of an #SBATCH option, which a blank or # would end without quotes."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'

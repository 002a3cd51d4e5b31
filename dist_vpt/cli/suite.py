"""``dist-vpt suite``."""

import argparse
from pathlib import Path
from typing import Any

from dist_vpt.cli.arguments import RECIPE, add_command
from dist_vpt.errors import UserError


def add_parser(commands: Any) -> None:
    help = "sweep tasks x methods, shared by several workers; the same command resumes"
    example = "dist-vpt suite sup_b16_in21k --tasks vtab --method vpt_deep --root /data --out runs/vtab"
    parser = add_command(commands, "suite", suite, help, rest="recipe", example=example)
    parser.add_argument("recipe", nargs="*", metavar=RECIPE, help="for all sweeps, such as a backbone's recipe")
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names, groups (vtab, natural, specialized, structured, fgvc) or recipe files of your own",
    )
    parser.add_argument(
        "--method", nargs="+", required=True, metavar="METHOD", help="recipes of methods, by name or file"
    )
    parser.add_argument("--shots", metavar="K,K,...", help="sweep each with these data.shots, such as 1,2,4,8,16")
    parser.add_argument("--root", metavar="DIR", help="folder of the datasets (data.root)")
    parser.add_argument("--out", metavar="DIR", default="runs/suite", help="folder of the suite (runs/suite)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes on this machine; default: one per GPU")
    parser.add_argument("--index", type=int, metavar="K", help="run only the K-th sweep of the plan, counted from 0")
    parser.add_argument("--slurm", metavar="FILE", help="write the script of a Slurm job array, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")


def suite(arguments: argparse.Namespace) -> None:
    from dist_vpt.experiments.suite import suite
    from dist_vpt.experiments.suite_plan import plan_experiments, show_plan, slurm_array
    from dist_vpt.recipe.loading import split_overrides

    # argparse gives all arguments that follow --method or --tasks to them, overrides too.
    methods, overrides = split_overrides(arguments.method)
    tasks, more = split_overrides(arguments.tasks)
    shared = [*arguments.recipe, *overrides, *more]
    root = arguments.root or ("." if arguments.dry_run else None)  # a plan reads no data
    experiments = plan_experiments(tasks, methods, shared, root, arguments.out, shots=_shots(arguments.shots))
    command = [*shared, "--tasks", *tasks, "--method", *methods, "--out", arguments.out]
    command += ["--root", arguments.root] if arguments.root else []
    command += ["--shots", arguments.shots] if arguments.shots is not None else []
    command += ["--debug"] if arguments.debug else []
    if arguments.dry_run:
        show_plan(experiments)
    elif arguments.slurm:
        if arguments.index is not None:
            raise UserError("--index: a job array numbers the sweeps by itself; leave it out, or --slurm")
        command += ["--workers", str(arguments.workers)] if arguments.workers is not None else []
        slurm_array(experiments, command, Path(arguments.slurm))
        print(f"sbatch {arguments.slurm}")
    else:
        suite(experiments, arguments.out, workers=arguments.workers, index=arguments.index, arguments=command)


def _shots(given: str | None) -> list[int]:
    """The numbers of --shots, none where it is not given."""
    numbers = [] if given is None else given.split(",")
    if not all(number.isdecimal() and int(number) > 0 for number in numbers) or len(set(numbers)) < len(numbers):
        raise UserError(f"--shots {given}: must be numbers above 0, each given once; write them as in 1,2,4,8,16")
    return [int(number) for number in numbers]

"""``dist-vpt``: thin sub-commands. Torch is imported by the one that runs, not by ``--help``."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_vpt import __version__
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import RecipeError, UserError

RECIPE = ("recipe", "overrides", "words")  # lists of words that are, or may be, keys of the recipe


def main(words: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code."""
    parser = _parser()
    arguments, more = parser.parse_known_args(words)
    if any(word.startswith("-") for word in more) or (more and "rest" not in arguments):
        keys = getattr(arguments, "rest", "") in RECIPE
        hint = " (keys of the recipe are words such as train.epochs=3)" if keys else ""
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    if more:  # argparse takes no words of a list after an option
        getattr(arguments, arguments.rest).extend(more)
    return run_with_exit_code(lambda: arguments.call(arguments), debug=arguments.debug)


def run_with_exit_code(call: Callable[[], Any], *, debug: bool) -> int:
    """Run ``call``; a user's mistake becomes one message and its exit code, everything else keeps its traceback."""
    try:
        call()
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        rank = LaunchEnv.current().rank
        if error.shared and rank:
            return error.exit_code
        print(f"{f'[process {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (held to the end of the process)
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-vpt", description="Tune frozen vision transformers: pay only for what you tune."
    )
    parser.add_argument("--version", action="version", version=f"dist-vpt {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recipe_help = "recipe files, merged in order, and a.b=c overrides"

    train = commands.add_parser("train", parents=[common], help="train on this process (several: accelerate launch)")
    train.add_argument("recipe", nargs="+", metavar="RECIPE|a.b=c", help=recipe_help)
    train.set_defaults(call=_train, rest="recipe")

    sweep = commands.add_parser("sweep", parents=[common], help="try a grid on val, then seeds of the best on test")
    sweep.add_argument("recipe", nargs="+", metavar="RECIPE|a.b=c", help=recipe_help)
    sweep.set_defaults(call=_sweep, rest="recipe")

    _add_plan(commands, common, recipe_help)
    _add_uses(commands, common)
    _add_attention(commands, common)
    compress = commands.add_parser(
        "compress", parents=[common], help="leave the worst features of a vqt run's head out"
    )
    compress.add_argument("run", metavar="RUN", help="a run folder of method vqt")
    compress.add_argument(
        "--keep", nargs="+", required=True, metavar="SHARE", help="shares of the features to keep, such as 0.7 0.5"
    )
    compress.add_argument(
        "--mode",
        choices=("compress", "featselect", "finetune"),
        default="featselect",
        help="the group lasso's head cut down, a new head on what is kept (default), or then the queries too",
    )
    compress.add_argument("--adapters", choices=("last", "best"), default="last")
    compress.add_argument("--lasso", type=float, default=1e-4, metavar="C", help="weight of the group lasso (1e-4)")
    compress.add_argument("--out", metavar="DIR", help="where the smaller runs go; default: RUN/compressed")
    compress.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as optim.lr=... or train.epochs=...")
    compress.set_defaults(call=_compress, rest="overrides")

    _add_suite(commands, common)
    status = commands.add_parser("status", parents=[common], help="how runs, sweeps and suites stand")
    status.add_argument("folders", nargs="+", metavar="DIR", help="their folders, or folders that they are in")
    status.add_argument("--json", action="store_true", help="a list of objects, for programs")
    status.add_argument(
        "--watch", nargs="?", const="5", metavar="SECONDS", help="again every 5 or so many seconds, until control-C"
    )
    status.set_defaults(call=_status, rest="folders")
    report = commands.add_parser("report", parents=[common], help="tables of results, next to published numbers")
    report.add_argument("folders", nargs="+", metavar="DIR", help="folders with a results.jsonl in or below them")
    report.add_argument("--out", metavar="FOLDER", help="write report.md, .csv and .html there, too")
    report.add_argument(
        "--published", action=argparse.BooleanOptionalAction, default=True, help="rows of published numbers"
    )
    report.set_defaults(call=_report, rest="folders")

    _add_data(commands, common)
    _add_backbones(commands, common)
    _add_launch(commands, common, recipe_help)
    _add_doctor(commands, common)

    recipe = commands.add_parser("recipe", help="show a resolved recipe, or the JSON Schema for editors")
    kinds = recipe.add_subparsers(required=True, metavar="COMMAND")
    show = kinds.add_parser("show", parents=[common], help="print the resolved recipe")
    show.add_argument("recipe", nargs="*", metavar="RECIPE|a.b=c", help=recipe_help)
    show.set_defaults(call=_show, rest="recipe")
    schema = kinds.add_parser("schema", parents=[common], help="print the JSON Schema of recipe files")
    schema.set_defaults(call=_schema)
    return parser


def _add_attention(commands: Any, common: argparse.ArgumentParser) -> None:
    attention = commands.add_parser(
        "attention", parents=[common], help="pictures of what a run's class token, prompts or queries attend to"
    )
    attention.add_argument("run", metavar="RUN", help="a run folder")
    attention.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    attention.add_argument("--adapters", choices=("last", "best"), default="last")
    attention.add_argument("--block", type=int, metavar="N", help="this block alone, each head beside the mean")
    attention.add_argument("--head", type=int, metavar="N", help="this head alone; default: the mean over heads")
    attention.add_argument("--out", metavar="DIR", help="where the PNG files go; default: RUN/attention")
    attention.set_defaults(call=_attention, rest="images")


def _add_uses(commands: Any, common: argparse.ArgumentParser) -> None:
    evaluate = commands.add_parser("eval", parents=[common], help="score a run's adapters again")
    evaluate.add_argument("run", metavar="RUN", help="a run folder")
    evaluate.add_argument("--split", choices=("train", "val", "trainval", "test"), default="test")
    evaluate.add_argument(
        "--adapters", choices=("last", "best"), default="last", help="of the last epoch, or the best on val"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="a.b=c", help="such as data.root=... or runtime.device=cpu")
    evaluate.set_defaults(call=_eval, rest="overrides")

    predict = commands.add_parser("predict", parents=[common], help="classify images with a run's adapters")
    predict.add_argument("run", metavar="RUN", help="a run folder")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    predict.add_argument("--adapters", choices=("last", "best"), default="last")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes shown per image (default 5)")
    predict.add_argument("--out", metavar="FILE", help="a .csv or .json file; default: CSV on the terminal")
    predict.set_defaults(call=_predict, rest="images")

    merge = commands.add_parser("merge", parents=[common], help="fold a run's adapters into plain timm weights")
    merge.add_argument("run", metavar="RUN", help="a run folder of linear, full, partial, bias, cls, lora or ssf")
    merge.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    merge.add_argument("--adapters", choices=("last", "best"), default="last")
    merge.set_defaults(call=_merge)


def _add_plan(commands: Any, common: argparse.ArgumentParser, recipe_help: str) -> None:
    plan = commands.add_parser("plan", parents=[common], help="memory of each policy and strategy, before running")
    plan.add_argument("recipe", nargs="+", metavar="RECIPE|a.b=c", help=recipe_help)
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="devices of a node (1)")
    plan.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes (1)")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of each, such as 24GiB; default: what this machine has")
    plan.add_argument("--measure", action="store_true", help="run two steps here, and show the estimate beside them")
    plan.set_defaults(call=_plan, rest="recipe")


def _add_suite(commands: Any, common: argparse.ArgumentParser) -> None:
    suite = commands.add_parser("suite", parents=[common], help="sweep tasks x methods: resumes, and runs shared out")
    suite.add_argument("words", nargs="*", metavar="RECIPE|a.b=c", help="for all of them, such as a backbone's recipe")
    suite.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names, groups (vtab, natural, specialized, structured, fgvc) or recipes of your own",
    )
    suite.add_argument(
        "--method", nargs="+", required=True, metavar="METHOD", help="recipes of configs/method, by name or path"
    )
    suite.add_argument("--root", metavar="DIR", help="folder in which the datasets lie (data.root)")
    suite.add_argument("--out", metavar="DIR", default="runs/suite", help="folder of the suite (runs/suite)")
    suite.add_argument("--workers", type=int, metavar="N", help="processes on this machine; default: one a GPU")
    suite.add_argument("--index", type=int, metavar="K", help="the K-th sweep of the plan alone, from 0")
    suite.add_argument("--slurm", metavar="FILE", help="write a Slurm job array that does it, and do nothing")
    suite.add_argument("--dry-run", action="store_true", help="show the plan, and do nothing")
    suite.set_defaults(call=_suite, rest="words")


def _add_data(commands: Any, common: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="prepare datasets of known tasks, or check what is there")
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = kinds.add_parser("prepare", parents=[common], help="fetch and prepare with TensorFlow Datasets")
    prepare.add_argument("tasks", nargs="+", metavar="TASK", help="such as dtd or svhn")
    prepare.add_argument("--root", required=True, metavar="DIR", help="folder in which the datasets lie")
    prepare.add_argument(
        "--format", choices=("array_record", "tfrecord"), default="array_record", help="of the files (array_record)"
    )
    prepare.set_defaults(call=_prepare, rest="tasks")
    check = kinds.add_parser("check", parents=[common], help="compare what is there with the published protocol")
    check.add_argument("tasks", nargs="*", metavar="TASK", help="default: whatever is there")
    check.add_argument("--root", required=True, metavar="DIR", help="folder in which the datasets lie")
    check.set_defaults(call=_check, rest="tasks")


def _add_backbones(commands: Any, common: argparse.ArgumentParser) -> None:
    backbones = commands.add_parser("backbones", parents=[common], help="list published weights, or check a file")
    backbones.set_defaults(call=_backbones)
    check = backbones.add_subparsers(metavar="COMMAND").add_parser(
        "check", parents=[common], help="say what a weight file is, and whether it loads"
    )
    check.add_argument("file", metavar="FILE", help="a .safetensors, .pth, .pth.tar or .npz file")
    check.set_defaults(call=_backbones_check)


def _add_launch(commands: Any, common: argparse.ArgumentParser, recipe_help: str) -> None:
    launch = commands.add_parser("launch", help="submit a training to a Slurm cluster")
    slurm = launch.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "slurm", parents=[common], help="write and submit a job that trains on any number of nodes"
    )
    slurm.add_argument("recipe", nargs="+", metavar="RECIPE|a.b=c", help=recipe_help)
    slurm.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    slurm.add_argument("--gpus-per-node", type=int, default=1, metavar="G", help="of each (1); 0: train on the CPUs")
    slurm.add_argument("--time", required=True, metavar="T", help="limit of one attempt, as sbatch takes it: 4:00:00")
    slurm.add_argument("--strategy", default="ddp", metavar="NAME", help="a file of launch/accelerate (ddp)")
    slurm.add_argument(
        "--max-restarts", type=int, default=9, metavar="N", help="how often Slurm may start the job again (9)"
    )
    slurm.add_argument("--dry-run", action="store_true", help="print the script, and do nothing")
    slurm.set_defaults(call=_launch_slurm, rest="recipe")


def _add_doctor(commands: Any, common: argparse.ArgumentParser) -> None:
    doctor = commands.add_parser("doctor", parents=[common], help="what is wrong with this machine, and how to mend it")
    doctor.add_argument("--run-dir", default="runs", metavar="DIR", help="where runs are to be written (runs)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(call=_doctor)


def _train(arguments: argparse.Namespace) -> None:
    from dist_vpt.experiments.run import run
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    run(load_recipe(*split_arguments(arguments.recipe)))


def _sweep(arguments: argparse.Namespace) -> None:
    from dist_vpt.experiments.sweep import sweep
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    sweep(load_recipe(*split_arguments(arguments.recipe)))


def _plan(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or torch's profiler talks to the terminal
    from dist_vpt.planning.machines import parse_memory
    from dist_vpt.planning.planner import plan
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    if arguments.gpus < 1 or arguments.nodes < 1:
        raise UserError(f"--gpus {arguments.gpus} --nodes {arguments.nodes}: each must be at least 1")
    memory = None if arguments.gpu_memory is None else parse_memory(arguments.gpu_memory)
    files, overrides = split_arguments(arguments.recipe)
    try:
        recipe = load_recipe(files, overrides)
    except RecipeError as error:
        recipe = _without_data(files, overrides, error)
    plan(recipe, arguments.gpus, arguments.nodes, memory, measured=arguments.measure)


def _without_data(files: Sequence[str], overrides: Sequence[str], error: RecipeError) -> Any:
    """The recipe of a known task, whose classes need no data, where all that it lacks is their folder."""
    from dist_vpt.data.tasks import TASKS
    from dist_vpt.recipe.loading import load_recipe

    try:
        recipe = load_recipe(files, [*overrides, "data.root=."])
    except RecipeError:
        raise error from None
    if recipe.data.task not in TASKS:
        raise error
    return recipe


def _eval(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.evaluate import evaluate_run

    evaluate_run(arguments.run, arguments.split, arguments.adapters, arguments.overrides)


def _predict(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.predict import predict

    predict(arguments.run, arguments.images, arguments.adapters, arguments.top, arguments.out)


def _attention(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.attention import show

    show(arguments.run, arguments.images, arguments.adapters, arguments.block, arguments.head, arguments.out)


def _merge(arguments: argparse.Namespace) -> None:
    from dist_vpt.inference.merge import merge

    merge(arguments.run, arguments.out, arguments.adapters)


def _compress(arguments: argparse.Namespace) -> None:
    from dist_vpt.experiments.compress import compress
    from dist_vpt.recipe.loading import split_arguments

    shares, overrides = split_arguments(arguments.keep)  # argparse gives --keep all words that follow it
    overrides += arguments.overrides
    compress(arguments.run, shares, arguments.mode, arguments.adapters, arguments.lasso, arguments.out, overrides)


def _suite(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from dist_vpt.experiments.suite import suite
    from dist_vpt.experiments.suite_plan import plan_experiments, show_plan, slurm_array
    from dist_vpt.recipe.loading import split_arguments

    methods, overrides = split_arguments(arguments.method)  # argparse gives --method all words that follow it
    tasks, more = split_arguments(arguments.tasks)
    words = [*arguments.words, *overrides, *more]
    root = arguments.root or ("." if arguments.dry_run else None)  # a plan reads no data
    pairs = plan_experiments(tasks, methods, words, root, arguments.out)
    again = [*words, "--tasks", *tasks, "--method", *methods, "--out", arguments.out]
    again += ["--root", arguments.root] if arguments.root else []
    again += ["--debug"] if arguments.debug else []
    if arguments.dry_run:
        show_plan(pairs)
    elif arguments.slurm:
        if arguments.index is not None:
            raise UserError("--index: a job array numbers the sweeps by itself; leave it out, or --slurm")
        again += ["--workers", str(arguments.workers)] if arguments.workers is not None else []
        slurm_array(pairs, again, Path(arguments.slurm))
        print(f"sbatch {arguments.slurm}")
    else:
        suite(pairs, arguments.out, workers=arguments.workers, index=arguments.index, arguments=again)


def _prepare(arguments: argparse.Namespace) -> None:
    from dist_vpt.data.prepare import prepare

    prepare(arguments.root, arguments.tasks, arguments.format)


def _check(arguments: argparse.Namespace) -> None:
    from dist_vpt.data.check import check

    check(arguments.root, arguments.tasks)


def _backbones(arguments: argparse.Namespace) -> None:
    from dist_vpt.backbones.weights.zoo import show

    show()


def _backbones_check(arguments: argparse.Namespace) -> None:
    from dist_vpt.backbones.weights.inspect import check

    check(arguments.file)


def _status(arguments: argparse.Namespace) -> None:
    from dist_vpt.cli.status import status

    watch = arguments.watch
    try:
        seconds = None if watch is None else float(watch)
    except ValueError:
        raise UserError(f"--watch {watch}: is not a number of seconds; name folders before --watch") from None
    status(arguments.folders, as_json=arguments.json, watch=seconds)


def _launch_slurm(arguments: argparse.Namespace) -> None:
    from dist_vpt.cli.launch import slurm

    slurm(
        arguments.recipe,
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        time=arguments.time,
        strategy=arguments.strategy,
        max_restarts=arguments.max_restarts,
        dry_run=arguments.dry_run,
    )


def _doctor(arguments: argparse.Namespace) -> None:
    from dist_vpt.cli.doctor import doctor

    doctor(arguments.run_dir, as_json=arguments.json)


def _report(arguments: argparse.Namespace) -> None:
    from dist_vpt.report.tables import report

    report(arguments.folders, arguments.out, with_published=arguments.published)


def _show(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.loading import load_recipe, split_arguments

    print(load_recipe(*split_arguments(arguments.recipe)).to_yaml(), end="")


def _schema(arguments: argparse.Namespace) -> None:
    from dist_vpt.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))


if __name__ == "__main__":
    sys.exit(main())

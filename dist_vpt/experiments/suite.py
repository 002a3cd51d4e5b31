"""``dist-vpt suite``: tasks x methods under one protocol, each a sweep, shared out among workers.

A **pair** is a task under a method, and its sweep's folder; a **piece** is what one worker does of it in one go: a
trial or a seed of a writer, all trials or all seeds of a reader, or the end, which tells the result. Whether a piece is
done is seen from the files that it leaves; that a worker is at it, from a lock that the system releases when the
worker's process ends, however it ends. So any number of workers, on any number of machines with a common folder, can be
started, killed and started again.

    OUT/manifest.json            the plan: pairs with their recipes' hashes and numbers of trials and seeds
    OUT/TASK/METHOD/             a sweep's folder
    OUT/results.jsonl            a line for each pair that has ended, also for one that failed
    OUT/claims/                  locks of pieces, and when a pair failed
"""

import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vpt.data.tasks import TASKS
from dist_vpt.distributed.launch_env import LaunchEnv, detach_from_launcher
from dist_vpt.errors import Interrupted, RecipeError, RunFailed, RunFolderError, UserError, nearest
from dist_vpt.files import raising_disk_full, read_json, write_atomically
from dist_vpt.recipe.differences import identity_keys
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe, grid_axes
from dist_vpt.runs.folder import RunFolder

if TYPE_CHECKING:
    from dist_vpt.distributed.signals import StopSignal
    from dist_vpt.experiments.sweep import SweepJob
    from dist_vpt.runs.results import Result

POLL_SECONDS = 0.5
STARTED = "DIST_VPT_SUITE_WORKER"  # set for the processes that a suite has started as its workers
GROUPS = {
    "vtab": ("natural", "specialized", "structured"),
    "natural": ("natural",),
    "specialized": ("specialized",),
    "structured": ("structured",),
    "fgvc": ("fgvc",),
}


@dataclass(frozen=True)
class Experiment:
    """A task under a method."""

    task: str
    method: str
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}"

    @property
    def folder(self) -> Path:
        return Path(str(self.recipe.run.dir))

    @property
    def key(self) -> str:
        """Hash of the resolved recipe, without where the run lies and what changes no number."""
        return hashlib.sha256(json.dumps(identity_keys(self.recipe), sort_keys=True).encode()).hexdigest()[:12]

    def settings(self) -> int:
        """Trials of the grid."""
        return math.prod(len(values) for _, values in grid_axes(self.recipe.sweep.grid))

    def images(self) -> int | None:
        """Images that go through the backbone, at least where trials stop early; None where no counts are known."""
        task = self.recipe.data.task
        counts = dict(TASKS[task].expected_counts) if task in TASKS else {}
        if not {"train", "val", "trainval", "test"} <= counts.keys():
            return None
        train, seeds = self.recipe.train, len(self.recipe.sweep.seeds)
        if self.recipe.method.reader and self.recipe.stream.cache != "none":
            return counts["train"] + counts["val"] + counts["trainval"] + counts["test"]
        trials = 1 if self.recipe.method.reader else self.settings()
        runs = 1 if self.recipe.method.reader else seeds
        scored = -(-train.epochs // train.eval_every)
        of_trial = train.epochs * counts["train"] + scored * counts["val"]
        return trials * of_trial + runs * train.epochs * counts["trainval"] + runs * counts["test"]


def plan_experiments(
    tasks: Sequence[str], methods: Sequence[str], words: Sequence[str], root: str | None, out: str
) -> list[Experiment]:
    """The pairs of a suite, tasks in the tables' order. Raises UserError with all mistakes of all recipes."""
    from dist_vpt.recipe.loading import says_method, split_arguments

    files, overrides = split_arguments(words)
    for method in methods:
        if not says_method(_recipe_file("method", method)):
            raise UserError(f"--method {method}: says no method; other recipes come before --tasks and --method")
    pairs, mistakes = [], []
    for name, file in task_recipes(tasks):
        for method in methods:
            folder = Path(out) / name / Path(method).stem
            given = [f"run.dir={folder}", "run.resume=auto", *([f"data.root={root}"] if root else [])]
            try:
                # The method last: an own task's recipe may inherit another one.
                recipe = load_recipe([file, *files, _recipe_file("method", method)], [*overrides, *given])
            except RecipeError as error:
                if root is None and "root is missing" in str(error):
                    raise RecipeError("--root DIR is missing: the folder in which the datasets lie") from error
                mistakes.append(f"{name} with {method}: {error}")
                continue
            pairs.append(Experiment(name, Path(method).stem, recipe))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    twice = [pair.name for pair in pairs if [other.name for other in pairs].count(pair.name) > 1]
    if twice:
        raise UserError(f"--tasks, --method: {twice[0]} is asked for twice; name each once")
    return pairs


def task_recipes(words: Sequence[str]) -> list[tuple[str, str]]:
    """Tasks and their recipes: known ones by their names or their groups', in the tables' order, then recipe files."""
    known = [name for name, row in TASKS.items() if row.group]
    wanted, own = set(), []
    for word in (part for each in words for part in each.split(",") if part):
        rows = [name for name in known if word == name or TASKS[name].group in GROUPS.get(word, ())]
        if not rows and not Path(word).is_file():
            raise UserError(
                f"--tasks {word}: neither a task, a group nor a recipe file; {nearest(word, [*GROUPS, *known])}"
            )
        wanted |= set(rows)
        own += [] if rows else [(Path(word).stem, word)]
    folders = {name: "fgvc" if TASKS[name].group == "fgvc" else "vtab" for name in known}
    if not wanted and not own:
        raise UserError(f"--tasks {' '.join(words)}: names no task; {nearest('', GROUPS)}")
    return [*((name, _recipe_file(folders[name], name)) for name in known if name in wanted), *own]


def suite(
    pairs: Sequence[Experiment],
    out: str,
    *,
    workers: int | None = None,
    index: int | None = None,
    arguments: Sequence[str],
) -> None:
    """Do what is left of a suite, by this process or by several that it starts, then show the results.

    ``index``: one pair, by its number in the plan (an element of a job array). ``arguments``: of the command, for the
    processes that are started. Raises RunFailed where a pair has failed, after all others are done.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    folder, launched = Path(out), LaunchEnv.current().world_size > 1
    _check_roots(pairs)
    pairs = [_settled(pair) for pair in pairs]
    _admit(folder, pairs)
    mine = list(pairs) if index is None else [_element(pairs, index)]
    reasons: dict[str, str] = {}
    if {pair.key for pair in mine} <= _done(folder):
        count = 0  # torch is not even loaded
    else:
        count = 1 if launched or STARTED in os.environ else workers or _devices()
    if launched:  # by a launcher of ours or another: each process is a worker of its own
        detach_from_launcher()
    if count > 1:
        _start(count, [*arguments, *([] if index is None else ["--index", str(index)])])
    elif count:
        suite_worker = _SuiteWorker(folder, mine)
        suite_worker.work()
        reasons = suite_worker.failed
    if STARTED in os.environ:
        return  # who started it tells the end
    failed = _conclude(folder, mine, reasons)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(mine)} have no result:\n" + "\n".join(failed))


def show_plan(pairs: Sequence[Experiment]) -> None:
    """Print what a suite would do."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{len(pairs)} sweeps, with backbone {', '.join({p.recipe.backbone.name: 1 for p in pairs})}")
    for column in ("", "task", "method", "trials", "seeds", "epochs", "images"):
        table.add_column(column, justify="left" if column in ("task", "method") else "right", no_wrap=True)
    for number, pair in enumerate(pairs):
        images = pair.images()
        told = "?" if images is None else f"{images:,}"
        trials, seeds = pair.settings(), len(pair.recipe.sweep.seeds)
        table.add_row(str(number), pair.task, pair.method, str(trials), str(seeds), str(pair.recipe.train.epochs), told)
    console = Console(highlight=False)
    console.print(table)
    trials = sum(pair.settings() for pair in pairs)
    images = sum(pair.images() or 0 for pair in pairs)
    seeds = sum(len(pair.recipe.sweep.seeds) for pair in pairs)
    for doubt in {doubt: 1 for pair in pairs for doubt in pair.recipe.doubts}:
        console.print(f"note: {doubt}", markup=False)
    unknown = "; ? where only the dataset itself can tell" if any(pair.images() is None for pair in pairs) else ""
    console.print(f"in all {trials:,} trials and {seeds:,} seeds, {images:,} images through the backbone{unknown}")


def slurm_array(pairs: Sequence[Experiment], arguments: Sequence[str], file: Path) -> None:
    """Write a Slurm script that does each pair as an element of a job array."""
    from dist_vpt.distributed.slurm_script import job_script

    directives = [
        "--job-name=dist-vpt-suite",
        f"--array=0-{len(pairs) - 1}",
        "--nodes=1",
        "--gpus-per-node=1",
        f"--cpus-per-task={1 + max(pair.recipe.data.workers for pair in pairs)}",
        "--output=slurm-%A_%a.log",
    ]
    text = job_script("dist-vpt suite --slurm", directives, ["suite_in_job", *arguments])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
        file.chmod(0o755)
    except OSError as error:
        raise UserError(f"--slurm {file}: cannot be written ({error.strerror}); name another file") from error


class _SuiteWorker:
    """One process that does pieces until none is left."""

    def __init__(self, folder: Path, pairs: Sequence[Experiment]):
        from rich.console import Console

        self.folder, self.pairs = folder, pairs
        self.failed: dict[str, str] = {}  # reasons by the pairs' keys, also where the disk has no room for them
        with _locked(folder / "claims" / "clock", wait=True):  # the file server's clock, which failures are told by
            (folder / "claims" / "clock").touch()
            self.began = (folder / "claims" / "clock").stat().st_mtime
        self.console = Console(highlight=False)

    def work(self) -> None:
        """Do pieces that nobody is at, and wait for those that others are at."""
        from dist_vpt.distributed.signals import StopSignal

        with StopSignal() as stop:
            waiting = False
            while True:
                left = [pair for pair in self.pairs if not self._over(pair)]
                if not left:
                    return
                if stop.asked:
                    raise Interrupted(f"{self.folder}: stopped; the same command goes on")
                if any(self._do_a_piece(pair, stop) for pair in left):
                    waiting = False
                    continue
                if not waiting:
                    self._show(f"waiting for other workers, which are at {len(left)} of {len(self.pairs)}")
                waiting = True
                time.sleep(POLL_SECONDS)

    def _do_a_piece(self, pair: Experiment, stop: "StopSignal") -> bool:
        """Whether there was something to do."""
        from dist_vpt.data.formats import open_splits
        from dist_vpt.experiments.sweep import Worker, check_splits

        worker: Worker | None = None
        try:
            for name, jobs in self._pieces(pair):
                with _locked(_claim_file(self.folder, pair, name), wait=False) as claimed:
                    if not claimed or self._over(pair):
                        continue
                    _forget_accelerator()
                    worker = worker or Worker(pair.recipe, self._begun(pair), 0, 1, stop, self.console)
                    if name == "end":
                        self._end(pair, worker)
                    elif any(not worker.done(job) for job in jobs):
                        self._show(f"{pair.name}: {name}")
                        check_splits(open_splits(pair.recipe.data))
                        worker.work(jobs)
                    else:
                        continue
                    return True
        except Interrupted as stopped:
            raise Interrupted(f"{self.folder}: stopped; the same command goes on ({stopped})") from stopped
        except UserError as error:
            self._fail(pair, str(error))
            return True
        except Exception as error:  # out of memory, a full disk, a bug: the other pairs go on
            told, reason = _claim_file(self.folder, pair, "traceback"), f"{type(error).__name__}: {error}".strip()[:500]
            try:
                told.write_text(traceback.format_exc())
            except OSError:
                traceback.print_exc()
            else:
                reason += f" (traceback in {told})"
            self._fail(pair, reason)
            return True
        return False

    def _pieces(self, pair: Experiment) -> "Iterator[tuple[str, list[SweepJob]]]":
        """Pieces that can be done now and that have left no outcome yet."""
        from dist_vpt.experiments.sweep import choose, grid_jobs, read_outcome, seed_jobs

        grid = grid_jobs(pair.recipe, pair.folder)
        stages: list[tuple[str, Callable[[], list[SweepJob]]]] = [
            ("trial", lambda: grid),
            (
                "seed",
                lambda: seed_jobs(pair.recipe, pair.folder, choose(grid, [read_outcome(job) for job in grid])),
            ),
        ]
        for name, jobs_of in stages:
            jobs = jobs_of()
            left = [job for job in jobs if not job.outcome.is_file()]
            if left and pair.recipe.method.reader:
                yield f"{name}s", jobs
            elif left:
                yield from ((f"{name} {job.number}", [job]) for job in left)
            if left:
                return
        yield "end", []

    def _begun(self, pair: Experiment) -> Any:
        """The sweep's folder, with its recipe in it."""
        folder = RunFolder(pair.folder)
        with _locked(_claim_file(self.folder, pair, "begin"), wait=True):
            if not folder.holds(pair.recipe, "sweep"):
                with folder.claimed(pair.recipe, kind="sweep"):
                    pass
        return folder

    def _end(self, pair: Experiment, worker: Any) -> None:
        from dist_vpt.experiments.sweep import choose, conclude, grid_jobs, read_outcome, seed_jobs
        from dist_vpt.runs.results import FILE, append

        grid = grid_jobs(pair.recipe, pair.folder)
        outcomes = [read_outcome(job) for job in grid]
        chosen = choose(grid, outcomes)
        seeds = seed_jobs(pair.recipe, pair.folder, chosen)
        told = [read_outcome(job) for job in seeds]
        content = conclude(worker.folder, pair.recipe, grid, outcomes, chosen, told, 0.0, None)
        append(self.folder / FILE, _result(pair, content, outcomes[chosen.number], seeds))
        spread = content["test"]["top1"]
        self._show(f"{pair.name}: test top1 {spread['mean']:.2f} ± {spread['std']:.2f} %")

    def _over(self, pair: Experiment) -> bool:
        """Whether the pair has a result, or has failed since this worker began."""
        failed = _claim_file(self.folder, pair, "failed")
        if pair.key in self.failed or (failed.is_file() and failed.stat().st_mtime >= self.began):
            return True
        return pair.key in _done(self.folder)

    def _fail(self, pair: Experiment, reason: str) -> None:
        from dist_vpt.runs.results import FILE, append

        self.failed[pair.key] = reason
        self._show(f"{pair.name}: failed: {reason}")
        try:
            _claim_file(self.folder, pair, "failed").write_text(reason + "\n")
            append(self.folder / FILE, _result(pair, failed=reason))
        except (OSError, UserError) as error:
            self._show(f"warning: this could not be written down ({error})")

    def _show(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _forget_accelerator() -> None:
    """Accelerate's state is the process's: a pair of another precision needs its own."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _check_roots(pairs: Sequence[Experiment]) -> None:
    """Raise UserError where a dataset's folder is none, or is one task's and several are asked for."""
    roots = {pair.recipe.data.root for pair in pairs if pair.recipe.data.format != "hf" and pair.recipe.data.root}
    for root in map(Path, sorted(roots)):
        if not root.expanduser().is_dir():
            raise UserError(f"--root {root}: is not a folder; name the one in which the datasets lie")
        tasks = {pair.task for pair in pairs if pair.recipe.data.root == str(root) and pair.task in TASKS}
        lists = [name for name in ("train800.txt", "train.json") if (root / name).is_file()]
        if len(tasks) > 1 and lists:
            raise UserError(f"--root {root}: is one task's folder ({lists[0]}), and {len(tasks)} tasks are asked for")


def _settled(pair: Experiment) -> Experiment:
    """The pair with the storage that is found below its root, which its results are then of."""
    from dist_vpt.data.config import resolve
    from dist_vpt.data.formats import stored_as

    data = pair.recipe.data
    try:
        found = stored_as(data, resolve(data))
    except UserError:  # told when the pair's turn comes, and the others go on
        return pair
    return replace(pair, recipe=pair.recipe.model_copy(update={"data": data.model_copy(update={"format": found})}))


def _result(
    pair: Experiment,
    content: dict[str, Any] | None = None,
    chosen: dict[str, Any] | None = None,
    seeds: "Sequence[SweepJob]" = (),
    failed: str | None = None,
) -> "Result":
    """What results.jsonl tells of a pair that has ended."""
    from datetime import UTC, datetime

    from dist_vpt.runs.results import Parameters, Protocol, Result, Spread

    recipe = pair.recipe
    common = {
        "run": pair.key,
        "task": pair.task,
        "group": TASKS[pair.task].group if pair.task in TASKS else None,
        "method": pair.method,
        "backbone": recipe.backbone.name,
        "precision": recipe.runtime.precision,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": pair.name,
    }
    if content is None or chosen is None:
        return Result.model_validate({**common, "failed": failed})
    runs = [read_json(file) for job in seeds if (file := RunFolder(str(job.recipe.run.dir)).result).is_file()]
    protocol = runs[0]["protocol"] | {"trials": pair.settings(), "epochs": recipe.train.epochs}
    return Result(
        **common,
        protocol=Protocol.model_validate(protocol),
        seeds=tuple(int(seed) for seed, test in content["seeds"].items() if test),
        chosen=content["chosen"],
        val={"last": chosen["last"]["val"]["top1"], "best": chosen["best"]["val"]["top1"]},
        epochs={"last": chosen["last"]["epoch"], "best": chosen["best"]["epoch"]},
        test={name: Spread.model_validate(spread) for name, spread in content["test"].items()},
        seconds=content["seconds"]["training"],
        peak_memory_mib=max(run["peak_memory_mib"] for run in runs),
        parameters=Parameters.model_validate(runs[0]["parameters"]),
        device=runs[0]["device"],
        versions=runs[0]["versions"],
    )


def _results(folder: Path) -> "list[Result]":
    from dist_vpt.runs.results import FILE, read

    return read(folder / FILE)[0] if (folder / FILE).is_file() else []


def _done(folder: Path) -> set[str]:
    """Keys of the pairs that have a result."""
    return {result.run for result in _results(folder) if not result.failed}


def _conclude(folder: Path, pairs: Sequence[Experiment], reasons: Mapping[str, str]) -> list[str]:
    """Print the table of a suite; returns a line for each pair without a result.

    ``reasons``: of failures by key, for those that the folder does not tell.
    """
    from rich.console import Console
    from rich.table import Table

    found = {result.run: result for result in _results(folder)}
    table = Table(title=f"{folder}: test top-1 (%), mean and standard deviation over seeds")
    for column in ("task", "method", "test top-1", "val top-1", "trained", "seconds", "chosen"):
        words = column in ("task", "method", "chosen")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "chosen")
    failed = []
    for pair in pairs:
        result = found.get(pair.key)
        if result is None or result.failed:
            reason = result.failed if result else reasons.get(pair.key, "was not begun")
            failed.append(f"  {pair.name}: {reason}")
            table.add_row(pair.task, pair.method, "failed")
            continue
        top1, parameters = result.test["top1"], result.parameters
        said = "\n".join(f"{key.removeprefix('optim.')} {value}" for key, value in result.chosen.items())
        table.add_row(
            pair.task,
            pair.method,
            f"{top1.mean:.2f} ± {top1.std:.2f}",
            f"{result.val['last']:.2f}",
            f"{parameters.trained:,}" if parameters else "",
            f"{result.seconds:.0f}",
            said,
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{folder / 'results.jsonl'}; dist-vpt report {folder} sets it beside published numbers", soft_wrap=True
    )
    return failed


def _admit(folder: Path, pairs: Sequence[Experiment]) -> None:
    """Write the plan, or compare it with the one that is there: the same, or more pairs of the same recipes."""
    file = folder / "manifest.json"
    try:
        (folder / "claims").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: cannot be a suite's folder ({error}); choose another") from error
    with _locked(folder / "claims" / "manifest", wait=True):
        try:
            known = dict(read_json(file)["pairs"]) if file.is_file() else {}
            _ = [pair["recipe"] for pair in known.values()]
        except (RunFolderError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{file}: damaged ({error}); remove it: what is done is kept") from error
        changed = [pair.name for pair in pairs if known.get(pair.name, {"recipe": pair.key})["recipe"] != pair.key]
        if changed:
            raise RunFolderError(
                f"{file}: {changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} was begun with "
                "another recipe; choose another --out, or undo what was changed"
            )
        told = {
            pair.name: {"recipe": pair.key, "trials": pair.settings(), "seeds": list(pair.recipe.sweep.seeds)}
            for pair in pairs
        }
        if known | told != known:
            with raising_disk_full("the plan", folder, "the same command goes on"):
                write_atomically(file, json.dumps({"pairs": known | told}, indent=1) + "\n")


def _start(count: int, arguments: Sequence[str]) -> None:
    """Run so many processes of this machine as workers, each on a device of its own, and wait for them."""
    devices, cores = _visible(), os.cpu_count() or 1
    children = []
    for number in range(count):
        environment = {
            **os.environ,
            STARTED: str(number),
            "LOCAL_WORLD_SIZE": str(count),  # of which each may fill a share of the memory
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        }
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        words = [sys.executable, "-m", "dist_vpt", "suite", *arguments, "--workers", "1"]
        children.append(subprocess.Popen(words, env=environment))

    def forward(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if {Interrupted.exit_code, -signal.SIGTERM, -signal.SIGUSR1} & set(codes):
        raise Interrupted("the workers were stopped; the same command goes on")
    for number, code in enumerate(codes):
        if code:
            print(f"worker {number} ended with exit code {code}; the same command goes on", file=sys.stderr)


def _devices() -> int:
    return len(_visible()) or 1


def _visible() -> list[str]:
    """Accelerators that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _element(pairs: Sequence[Experiment], index: int) -> Experiment:
    if not 0 <= index < len(pairs):
        raise UserError(f"--index {index}: the suite has the elements 0 to {len(pairs) - 1} (dist-vpt suite --dry-run)")
    return pairs[index]


def _claim_file(folder: Path, pair: Experiment, piece: str) -> Path:
    return folder / "claims" / f"{pair.name}/{piece}".replace("/", "__").replace(" ", "-")


@contextmanager
def _locked(file: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that ends with this process; yields whether it was to be had."""
    try:
        opened = open(file, "a")  # noqa: SIM115 (closed by the with below)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be opened ({error.strerror}); free space there, or choose another --out"
        ) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise UserError(
                f"{file}: this file system has no locks ({error.strerror}); mount it with them (Lustre: flock), or "
                "choose another --out"
            ) from error
        yield True


def _recipe_file(folder: str, name: str) -> str:
    """A recipe by its path, or by its name in configs/ of the working directory or of this source tree."""
    if Path(name).is_file():
        return name
    places = [Path("configs") / folder, Path(__file__).parents[2] / "configs" / folder]
    for place in places:
        if (place / f"{name}.yaml").is_file():
            return str(place / f"{name}.yaml")
    known = [path.stem for place in places for path in place.glob("*.yaml")]
    raise UserError(f"{name}: no such recipe file, and none of that name in configs/{folder}; {nearest(name, known)}")

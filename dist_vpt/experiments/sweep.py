"""``dist-vpt sweep``: a grid trained on train and chosen on val, then some seeds of the chosen setting on trainval.

A reader's trials are trained together, in one pass over the frozen stream; a writer's one after the other, each as a
run of its own. Several processes share the trials (``sweep.parallelize=trials``: each works alone and writes its
results into the sweep's folder) or the batches (``sweep.parallelize=batch``).

    RUN/recipe.yaml, run.json     the sweep's recipe and status
    RUN/trials/NNN.json           one trial of the grid: its setting, its recipe, last and best epoch on val
    RUN/seeds/SEED/               one run on trainval: adapters and result.json, which eval, predict and compress take
    RUN/sweep.json, heatmap.png   the table, the choice, mean and standard deviation on test
"""

import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table

from dist_vpt.data.splits import Splits
from dist_vpt.distributed.collectives import on_main_process
from dist_vpt.distributed.launch_env import LaunchEnv, detach_from_launcher
from dist_vpt.distributed.rank_status import phase, read_rank_status
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.watchdog import RankWatchdog
from dist_vpt.errors import Diverged, Interrupted, RecipeError, RunFailed, RunFolderError, UserError, nearest
from dist_vpt.experiments.run import acquire, run
from dist_vpt.files import raising_disk_full, read_json, write_atomically
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.recipe.differences import RESUMABLE_KEYS, differences, identity_keys
from dist_vpt.recipe.loading import load_recipe_from
from dist_vpt.recipe.schema import Recipe, SweepConfig, grid_axes
from dist_vpt.runs.adapters import collect, write_adapters
from dist_vpt.runs.folder import GOES_ON, RunFolder
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runs.result import run_result, write_result
from dist_vpt.training.accelerator import capture_user_error, init_accelerator, make_accelerator, strategy_name
from dist_vpt.training.build_trials import PER_TRIAL_KEYS, build_trial_group
from dist_vpt.training.components import Components, build_components
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import fit_trials, score_trials

POLL_SECONDS = 0.5
# What launchers tell a process of the others; a process that trains trials of its own must not see it. How many share
# the machine (LOCAL_WORLD_SIZE) it must: the memory is one.


@dataclass(frozen=True)
class SweepJob:
    """One trial: its place in the table, what it sets, its whole recipe, where its outcome goes."""

    number: int
    setting: dict[str, Any]
    recipe: Recipe
    outcome: Path


def sweep(recipe: Recipe) -> dict[str, Any]:
    """Run or go on with a sweep; returns the content of sweep.json on the first process, {} on the others."""
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"resume": "auto"})})
    launch = LaunchEnv.current()
    rank, world = launch.rank, launch.world_size
    if recipe.sweep.parallelize == "trials":
        detach_from_launcher()
    folder, console = RunFolder(str(recipe.run.dir)), Console(highlight=False)
    grid = grid_jobs(recipe, folder.path)
    together = recipe.sweep.parallelize == "batch"  # or each is on its own
    refused = None
    if rank == 0 or together:  # mistakes in data and weights show before anything is written or waited for

        def check() -> None:
            parts = build_components(grid[0].recipe)
            check_splits(parts.splits)
            parts.method.train()

        _, refused = capture_user_error(check)
    with StopSignal() as stop, ExitStack() as leaving:
        accelerator, done = None, False
        if together:
            accelerator = init_accelerator(grid[0].recipe, refused, leaving)
            _refuse_deepspeed(recipe, accelerator)
            done = acquire(folder, recipe, accelerator, leaving, "sweep")
        elif rank == 0:
            done = leaving.enter_context(folder.claimed(recipe, "sweep"))
        else:
            _wait_for_claim(folder, recipe, stop)  # else its place among the processes would be swept away
        if done:
            if rank:
                return {}
            _print(read_json(folder.path / "sweep.json"), folder.path, console)
            return read_json(folder.path / "sweep.json")
        # Where each is on its own, none keeps the others waiting.
        minutes = recipe.run.timeout_minutes if together else math.inf
        leaving.enter_context(RankWatchdog(folder, rank, world, minutes, phase))
        worker = Worker(recipe, folder, rank, world, stop, console, accelerator)
        for doubt in recipe.warnings:
            worker.show(f"note: {doubt}")
        began = time.monotonic()
        worker.work(grid)
        outcomes = worker.wait_for(grid)
        chosen = choose(grid, outcomes)
        finals = seed_jobs(recipe, folder.path, chosen)
        worker.work(finals)
        results = worker.wait_for(finals)
        if rank:
            return {}
        with raising_disk_full("the table", folder.path, GOES_ON):
            return conclude(folder, recipe, grid, outcomes, chosen, results, time.monotonic() - began, console)


def check_splits(splits: Splits) -> None:
    """Raises DataError where one that a sweep needs is missing: now, not after hours of training."""
    for name in ("val", "trainval", "test"):
        splits[name]


def grid_jobs(recipe: Recipe, folder: Path) -> list[SweepJob]:
    """A trial for every point of the grid. Raises RecipeError where a value is not one that its key takes."""
    axes = list(grid_axes(recipe.sweep.grid))
    unknown = [said for key, _ in axes if (said := _unknown(recipe.model_dump(mode="json"), key))]
    if unknown:
        raise RecipeError("\n".join(f"sweep.grid.{said}" for said in unknown))
    jobs, mistakes = [], []
    for number, values in enumerate(itertools.product(*(values for _, values in axes))):
        setting = {key: value for (key, _), value in zip(axes, values, strict=True)}
        fixed = {"data.train_on": "train", "train.test": False, "run.dir": str(folder / "trials" / f"{number:03d}")}
        try:
            trial = _with(recipe, {**setting, **fixed})
        except RecipeError as error:
            mistakes.append(f"{_said(setting)}: {error}")
            continue
        jobs.append(SweepJob(number, setting, trial, folder / "trials" / f"{number:03d}.json"))
    if mistakes:
        raise RecipeError("sweep.grid: " + "\n".join(dict.fromkeys(mistakes)))
    other = [job for job in jobs if job.recipe.method.reader != recipe.method.reader]
    if other:
        raise RecipeError(
            f"sweep.grid.method.name: {other[0].recipe.method.name} and the recipe's {recipe.method.name} cannot share "
            "a sweep, since one reads the frozen stream and the other changes it; sweep them apart"
        )
    return jobs


def seed_jobs(recipe: Recipe, folder: Path, chosen: SweepJob) -> list[SweepJob]:
    """The chosen setting on trainval, once for each seed."""
    jobs = []
    for number, seed in enumerate(recipe.sweep.seeds):
        where = folder / "seeds" / str(seed)
        fixed = {"seed": seed, "data.train_on": "trainval", "train.early_stop": None, "run.dir": str(where)}
        trial = _with(recipe, {**chosen.setting, **fixed, "train.test": True})
        jobs.append(SweepJob(number, {"seed": seed}, trial, folder / "seeds" / f"{seed}.json"))
    return jobs


def choose(jobs: Sequence[SweepJob], outcomes: Sequence[dict[str, Any]]) -> SweepJob:
    """The trial with the best accuracy on val after its last epoch; ties go to the smaller learning rate."""
    alive = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if not outcome["diverged"]]
    if not alive:
        raise RunFailed(
            "every trial of the grid diverged; choose another run.dir (of a suite: another --out), and smaller values "
            "of sweep.grid.optim.lr or an optim.clip_norm"
        )
    return min(alive, key=lambda found: (-found[1]["last"]["val"]["top1"], found[0].recipe.optim.lr, found[0].number))[
        0
    ]


class Worker:
    """What one process does of a sweep."""

    def __init__(  # noqa: PLR0917 (a sweep as one process sees it)
        self,
        recipe: Recipe,
        folder: RunFolder,
        rank: int,
        world: int,
        stop: StopSignal,
        console: Console,
        accelerator: Accelerator | None = None,
    ):
        self.recipe, self.folder, self.stop, self.console = recipe, folder, stop, console
        shared = accelerator is not None and recipe.sweep.parallelize == "batch"  # a suite's runners share no batch
        self.first, (self.rank, self.world), self.shared = rank == 0, (0, 1) if shared else (rank, world), shared
        self.accelerator = accelerator  # where each is on its own, made when it is needed

    def work(self, jobs: Sequence[SweepJob]) -> None:
        """Do what has no outcome yet of this process's share, which does not depend on when it looks."""
        mine = jobs[self.rank :: self.world]
        if self.recipe.method.reader:
            for together in _passes(mine):
                self._train_together(together)
            return
        for job in mine:
            if not self._agreed(self.done(job)):
                self._train_alone(job)

    def wait_for(self, jobs: Sequence[SweepJob]) -> list[dict[str, Any]]:
        """The outcomes of all jobs, those of other processes included."""
        waiting = True
        while missing := [job for job in jobs if not self.done(job)]:
            if self.stop.asked:
                raise Interrupted(f"{self.folder.path}: stopped; the same command goes on")
            if waiting:
                self.show(f"waiting for {len(missing)} trials of other processes")
                waiting = False
            time.sleep(POLL_SECONDS)
        return [read_outcome(job) for job in jobs]

    def done(self, job: SweepJob) -> bool:
        """Whether a trial has left its outcome. Raises RunFolderError where that is of another recipe."""
        if not job.outcome.is_file():
            return False
        stored = load_recipe_from(read_outcome(job)["recipe"])
        changed = [line for line in differences(stored, job.recipe) if not line.startswith(RESUMABLE_KEYS)]
        if changed:
            raise RunFolderError(f"{job.outcome}: is of another trial ({'; '.join(changed)}); choose another run.dir")
        return True

    def _agreed(self, found: Any) -> Any:
        """What main has found in the folder, where batches are shared: another node may see a file late."""
        return broadcast_object_list([found])[0] if self.shared else found

    def _train_together(self, jobs: Sequence[SweepJob]) -> None:
        untold = self._agreed([job.number for job in jobs if not self.done(job)])
        if not untold:
            return
        state = self._state_of(jobs)
        # Of a pass that was killed after its end, whose outcomes are partly told, there is one.
        if not self._agreed(state.is_file()):
            jobs = [job for job in jobs if job.number in untold]
            state = self._state_of(jobs)
        if self.accelerator is None:
            self.accelerator = make_accelerator(self.recipe)
        recipes = [job.recipe for job in jobs]
        self.show(f"{len(jobs)} trials in one pass: {_said(jobs[0].setting)} to {_said(jobs[-1].setting)}")
        with advice_on_memory(recipes[0], self.accelerator, trials=len(jobs)):
            p = build_trial_group(recipes, self.accelerator, self.stop, state, self.show, check_memory=check_memory)
            try:
                fit_trials(p)
                scored = [t for t in p.trials if not t.diverged] if recipes[0].train.test else []
                tests = [scores.compute() for scores in (score_trials(p, scored, "test") if scored else [])]
            finally:
                p.close()
        skipped = sorted(p.skipped)
        if skipped:
            self.show(f"{len(skipped)} unreadable images skipped")
        for trial, test in zip(scored, tests, strict=True):
            trial.progress.last["test"] = test
            if not math.isfinite(test["loss"]):
                trial.diverged = f"the loss on test was {test['loss']}"

        def write() -> None:
            for job, trial in zip(jobs, p.trials, strict=True):
                if job.number not in untold:
                    continue
                if recipes[0].train.test and not trial.diverged:
                    self._write_run(job, trial, p.parts, p.seconds / len(jobs), skipped)
                progress, seconds = trial.progress, p.seconds / len(jobs)
                self._tell(job, progress.last, progress.best, trial.diverged, seconds, skipped)
            state.unlink(missing_ok=True)

        on_main_process(self.accelerator, write, "outcomes", self.folder.path, GOES_ON)

    def _state_of(self, jobs: Sequence[SweepJob]) -> Path:
        """Where a pass of these jobs keeps its state while it is under way."""
        name = hashlib.sha256(json.dumps([identity_keys(job.recipe) for job in jobs]).encode()).hexdigest()[:16]
        return self.folder.path / f".pass-{name}.pt"

    def _write_run(
        self, job: SweepJob, trial: Trial, parts: Components, seconds: float, skipped: Sequence[str]
    ) -> None:
        """A trial as a run folder that eval, predict and compress take."""
        assert self.accelerator is not None
        folder, tensors = RunFolder(str(job.recipe.run.dir)), collect(trial.reader)
        folder.path.mkdir(parents=True, exist_ok=True)
        facts = {"recipe": job.recipe.model_dump(mode="json"), "classes": list(parts.splits.classes)}
        write_adapters(folder.adapters, tensors, {**facts, "epoch": trial.progress.last["epoch"]})
        result = run_result(
            job.recipe,
            last=trial.progress.last,
            best=trial.progress.best,
            seconds=seconds,
            images_per_s=trial.progress.images / seconds if seconds else 0.0,
            parameters={
                "trained": sum(p.numel() for p in trial.trained),
                "total": sum(p.numel() for p in trial.reader.parameters()),
            },
            skipped=skipped,
            device=device_name(self.accelerator.device),
            processes=self.accelerator.num_processes,
            strategy=strategy_name(self.accelerator),
            runtime=trial.reader.backbone.chosen,
            protocol=parts.protocol(),
        )
        write_result(folder, result)
        if parts.splits.carved:
            write_atomically(folder.splits, json.dumps(parts.carved(), indent=1) + "\n")
        write_atomically(folder.recipe, job.recipe.to_yaml())
        folder.mark("done")

    def _train_alone(self, job: SweepJob) -> None:
        try:
            result, diverged = run(job.recipe), ""
        except Diverged as error:  # alone: too little memory or disk is no outcome of the setting
            result, diverged = {"last": {}, "best": {}, "seconds": 0.0, "skipped_images": []}, str(error)

        def write() -> None:
            last, best, seconds = result["last"], result["best"] or {}, result["seconds"]
            self._tell(job, last, best, diverged, seconds, result["skipped_images"])

        if self.shared:
            assert self.accelerator is not None
            on_main_process(self.accelerator, write, "outcomes", self.folder.path, GOES_ON)
        else:
            write()

    def _tell(  # noqa: PLR0917 (what there is to tell)
        self,
        job: SweepJob,
        last: dict[str, Any],
        best: dict[str, Any],
        diverged: str,
        seconds: float,
        skipped: Sequence[str],
    ) -> None:
        outcome = {
            "setting": job.setting,
            "last": last,
            "best": best or None,
            "diverged": diverged or None,
            "seconds": round(seconds, 3),
            "skipped_images": list(skipped),
            "recipe": job.recipe.model_dump(mode="json"),
        }
        with raising_disk_full("outcomes", self.folder.path, GOES_ON):
            job.outcome.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(job.outcome, json.dumps(outcome, indent=1) + "\n")

    def show(self, text: str) -> None:
        """Print a line, on the first process."""
        if self.first and text:
            self.console.print(text, markup=False, soft_wrap=True)


def _refuse_deepspeed(recipe: Recipe, accelerator: Accelerator) -> None:
    if recipe.method.reader and accelerator.state.deepspeed_plugin is not None:
        refused = UserError("a reader's sweep shares one small model: start it with launch/accelerate/ddp.yaml")
        refused.shared = True  # the recipe and the launcher's file are the same everywhere
        raise refused


def read_outcome(job: SweepJob) -> dict[str, Any]:
    """What a trial has left. Raises RunFolderError where that is damaged."""
    outcome = read_json(job.outcome)
    lacking = {"setting", "last", "best", "diverged", "seconds", "recipe"} - set(outcome)
    if lacking:
        raise RunFolderError(
            f"{job.outcome}: damaged (it has no {sorted(lacking)[0]!r}); remove it, and its trial is trained again"
        )
    return outcome


def heatmap_figure(jobs: Sequence[SweepJob], outcomes: Sequence[dict[str, Any]], chosen: SweepJob) -> Any:
    """Accuracy on val over the grid's first two keys that vary; over further keys, the best of each cell."""
    from matplotlib.figure import Figure

    keys = [key for key in jobs[0].setting if len({repr(job.setting[key]) for job in jobs}) > 1]
    keys = (keys + [key for key in jobs[0].setting if key not in keys])[:2]
    values = [list(dict.fromkeys(job.setting[key] for job in jobs)) for key in keys]
    values += [[None]] * (2 - len(keys))
    rows, columns = values
    best: dict[tuple[int, int], float | None] = {}
    for job, outcome in zip(jobs, outcomes, strict=True):
        cell = [where.index(job.setting[key]) for key, where in zip(keys, values, strict=False)] + [0, 0]
        top1 = None if outcome["diverged"] else outcome["last"]["val"]["top1"]
        before = best.get((cell[0], cell[1]))
        best[cell[0], cell[1]] = max((v for v in (before, top1) if v is not None), default=None)
        if job is chosen:
            marked = (cell[0], cell[1])
    figure = Figure(figsize=(2.2 + 1.1 * len(columns), 1.8 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shown = [[best.get((r, c)) for c in range(len(columns))] for r in range(len(rows))]
    numbers = [[float("nan") if v is None else v for v in row] for row in shown]
    image = axes.imshow(numbers, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label="val top-1, last epoch (%)")
    axes.set_xticks(range(len(columns)), map(_short, columns))
    axes.set_yticks(range(len(rows)), map(_short, rows))
    axes.set(ylabel=keys[0], xlabel=keys[1] if len(keys) > 1 else "", title="Trials (chosen one framed)")
    low, high = image.get_clim()
    for r, row in enumerate(shown):
        for c, value in enumerate(row):
            dark = value is not None and value < (low + high) / 2
            text = "diverged" if value is None else f"{value:.1f}"
            axes.text(c, r, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((marked[1] - 0.5, marked[0] - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.5))
    return figure


def conclude(  # noqa: PLR0917 (all that a sweep found)
    folder: RunFolder,
    recipe: Recipe,
    grid: Sequence[SweepJob],
    outcomes: Sequence[dict[str, Any]],
    chosen: SweepJob,
    results: Sequence[dict[str, Any]],
    seconds: float,
    console: Console | None,
) -> dict[str, Any]:
    """Write the sweep's table, picture and curves from all outcomes, and show them on the console. Can be repeated."""
    from torch.utils.tensorboard import SummaryWriter

    lost = {str(r["setting"]["seed"]): r["diverged"] for r in results if r["diverged"]}
    tests = {str(r["setting"]["seed"]): None if r["diverged"] else r["last"]["test"] for r in results}
    scores = [test for test in tests.values() if test]
    if not scores:
        raise RunFailed(
            f"all seeds of the chosen setting diverged ({_said(chosen.setting)}: {next(iter(lost.values()))}); "
            "choose another run.dir (of a suite: another --out), and smaller values of sweep.grid.optim.lr or an "
            "optim.clip_norm"
        )
    trained = sum(o["seconds"] for o in [*outcomes, *results])
    content: dict[str, Any] = {
        "chosen": chosen.setting,
        "test": {name: _spread([score[name] for score in scores]) for name in scores[0]},
        "seeds": tests,
        "diverged_seeds": lost,
        "trials": [
            {"number": job.number, **{key: outcome[key] for key in ("setting", "last", "best", "diverged", "seconds")}}
            for job, outcome in zip(grid, outcomes, strict=True)
        ],
        "skipped_images": sorted({file for o in [*outcomes, *results] for file in o.get("skipped_images", ())}),
        "seconds": {"of this session": round(seconds, 1), "training": round(trained, 1)},
        "versions": versions(),
    }
    figure = heatmap_figure(grid, outcomes, chosen)
    figure.savefig(folder.path / "heatmap.png", dpi=120)
    if "tensorboard" in recipe.run.trackers:
        with SummaryWriter(str(folder.path / "tb")) as writer:
            writer.add_figure("sweep/val_top1", figure)
            for name, spread in content["test"].items():
                writer.add_scalar(f"test/{name}_mean", spread["mean"], 0)
                writer.add_scalar(f"test/{name}_std", spread["std"], 0)
    write_atomically(folder.path / "sweep.json", json.dumps(content, indent=1) + "\n")
    # Of passes that were divided among another number of processes, and of their writes that were killed.
    for left in (*folder.path.glob(".pass-*.pt"), *folder.path.glob("..pass-*.tmp")):
        left.unlink(missing_ok=True)  # where trials are split, who told the last outcome removes its own
    folder.mark("done")
    if console is not None:
        _print(content, folder.path, console)
    return content


def _print(content: dict[str, Any], folder: Path, console: Console) -> None:
    table = Table(title=f"{folder}: trials, trained on train and scored on val (top-1, %)")
    keys = list(content["chosen"])
    for column in (*keys, "last epoch", "best epoch", "at epoch", "chosen"):
        table.add_column(column, justify="right")
    for trial in content["trials"]:
        setting = [_short(trial["setting"][key]) for key in keys]
        if trial["diverged"]:
            table.add_row(*setting, "diverged", "", "", "")
            continue
        last, best = trial["last"]["val"]["top1"], trial["best"]
        mark = "*" if trial["setting"] == content["chosen"] else ""
        table.add_row(*setting, f"{last:.2f}", f"{best['val']['top1']:.2f}", str(best["epoch"]), mark)
    console.print(table)
    top1 = content["test"].get("top1")
    if top1:
        console.print(
            f"test top1 {top1['mean']:.2f} ± {top1['std']:.2f} % over {len(top1['values'])} seeds on trainval "
            f"({_said(content['chosen'])})",
            markup=False,
        )
    for seed, reason in content["diverged_seeds"].items():
        console.print(f"left out of that mean: seed {seed} diverged ({reason})", markup=False, soft_wrap=True)
    if skipped := content.get("skipped_images"):
        console.print(f"without {len(skipped)} images that cannot be read: they are named in the file below")
    console.print(str(folder / "sweep.json"), markup=False, soft_wrap=True)


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": list(values),
    }


def _passes(jobs: Sequence[SweepJob]) -> list[list[SweepJob]]:
    """Jobs that can be trained together: those whose recipes differ in MAY_DIFFER alone."""
    passes: list[list[SweepJob]] = []
    for job in jobs:
        for together in passes:
            changed = [line.split(":")[0] for line in differences(together[0].recipe, job.recipe)]
            if all(key in PER_TRIAL_KEYS for key in changed):
                together.append(job)
                break
        else:
            passes.append([job])
    return passes


def _with(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with keys set, without its sweep, its data order fixed to what all trials share."""
    data = recipe.model_dump(mode="json")
    data["sweep"] = SweepConfig().model_dump(mode="json")
    order = recipe.seed if recipe.train.data_seed is None else recipe.train.data_seed
    for key, value in {"train.data_seed": order, **values}.items():
        into, *_ = (data,)
        *path, name = key.split(".")
        for part in path:
            into = into[part]
        into[name] = value
    return load_recipe_from(data)


def _unknown(data: dict[str, Any], key: str) -> str:
    """What is wrong with a recipe's key; nothing where there is nothing."""
    into: Any = data
    for part in key.split("."):
        if not isinstance(into, dict) or part not in into:
            hint = nearest(part, into) if isinstance(into, dict) else "leave it out"
            return f"{key}: there is no such key; {hint}"
        into = into[part]
    return ""


def _wait_for_claim(folder: RunFolder, recipe: Recipe, stop: StopSignal) -> None:
    """Until the first process has claimed the folder. Others that would start before it might be in a wrong one.

    A sweep that was killed still says that it runs: what counts is that somebody holds the folder and began it anew.
    """
    deadline, beat = time.monotonic() + 60 * recipe.run.timeout_minutes, None
    while True:
        # Where locks do not reach other machines, the first process's signs of life say the same.
        last, beat = beat, read_rank_status(folder.path, 0).get("beat")
        alive = folder.under_way() or (last is not None and beat is not None and beat != last)
        if folder.holds(recipe, "sweep") and (alive or folder.status().get("status") == "done"):
            return
        if stop.asked:
            raise Interrupted(f"{folder.path}: stopped; the same command goes on")
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"{folder.path}: the first process has not begun this sweep in {recipe.run.timeout_minutes} minutes; "
                "see what it says, or whether the folder is shared by all nodes"
            )
        time.sleep(POLL_SECONDS)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _said(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items())

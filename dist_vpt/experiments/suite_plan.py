"""The experiments of a suite: their recipes, what they cost, and the manifest that records them. Needs no torch."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dist_vpt.data.config import VAL_SHOTS
from dist_vpt.data.tasks import TASKS
from dist_vpt.errors import RecipeError, RunFolderError, UserError, nearest
from dist_vpt.files import locked, raising_disk_full, read_json, write_atomically
from dist_vpt.recipe.differences import identity_keys
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.shipped import shipped_recipes
from dist_vpt.recipe.sweep_section import RungSize
from dist_vpt.runs.folder import RESUME_HINT

GROUPS = {
    "vtab": ("natural", "specialized", "structured"),
    "natural": ("natural",),
    "specialized": ("specialized",),
    "structured": ("structured",),
    "fgvc": ("fgvc",),
}
EMBEDDED = {"digits": "digits/common", "shapes_ori": "shapes/ori", "shapes_loc": "shapes/loc"}  # task -> its recipe
LOCK_FIX = "choose another --out"  # for files of a suite that cannot be locked


@dataclass(frozen=True)
class Experiment:
    """A task under a method."""

    task: str
    method: str
    recipe: Recipe
    planned: Recipe | None = None  # where a worker has resolved the recipe for its machine: that of the suite
    shots: int | None = None  # of --shots; None: what the recipe says

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}" + (f"-{self.shots}-shot" if self.shots else "")

    @property
    def trained(self) -> str:
        """The method, with the shots of --shots, for tables."""
        return f"{self.method}, {self.shots}-shot" if self.shots else self.method

    @property
    def folder(self) -> Path:
        return Path(str(self.recipe.run.dir))

    @property
    def key(self) -> str:
        """Hash of the suite's recipe, without its run folder and the keys that change no number."""
        return hashlib.sha256(
            json.dumps(identity_keys(self.planned or self.recipe), sort_keys=True).encode()
        ).hexdigest()[:12]

    @property
    def trials(self) -> int:
        """Settings of the grid."""
        return self.recipe.sweep.trials

    @property
    def rungs(self) -> list[RungSize]:
        """One for a grid."""
        return self.recipe.sweep.rungs(self.recipe.train.epochs)

    @property
    def seeds(self) -> int:
        """Trainings of the chosen setting."""
        return self.recipe.data.tries if self.recipe.data.tries > 1 else len(self.recipe.sweep.seeds)

    @property
    def search(self) -> str:
        """How the setting is found; halving that has but one rung is a grid."""
        return "halving" if len(self.rungs) > 1 else "grid"

    def counts(self) -> dict[str, int] | None:
        """Images of train, val, test, and of what the seeds are trained on; None for a task without known counts."""
        data = self.recipe.data
        row = TASKS.get(data.task)
        counts = dict(row.expected_counts) if row else {}
        if row is not None and row.classes and data.shots is not None and "test" in counts:
            train, val = data.shots * row.classes, min(data.shots, VAL_SHOTS) * row.classes
            return counts | {"train": train, "val": min(val, counts.get("val", val)), "final": train}
        if not {"train", "val", "trainval", "test"} <= counts.keys():
            return None
        counts["train"] = round(data.fraction * counts["train"])
        return counts | {"final": counts["train"] + counts["val"]}

    def images(self) -> int | None:
        """Images that go through the backbone, at most if trials stop early; None for a task without known counts."""
        counts = self.counts()
        if counts is None:
            return None
        train, data, reader = self.recipe.train, self.recipe.data, self.recipe.method.reader
        passes = data.tries if reader else self.seeds  # over the images of the seeds: a reader's share their draw's
        val = 0 if data.shots is None else counts["val"]  # which the seeds are scored on where it is not trained on
        if reader and self.recipe.stream.cache != "none":  # filled for each rung
            final = passes * (counts["final"] + val + counts["test"])
            return len(self.rungs) * (counts["train"] + counts["val"]) + final
        scored = -(-train.epochs // train.eval_every)
        images = passes * (train.epochs * counts["final"] + scored * val + counts["test"])
        for number, (trials, epochs) in enumerate(self.rungs, start=1):
            scored = -(-epochs // train.eval_every) if number == len(self.rungs) else 1
            images += (1 if reader else trials) * (epochs * counts["train"] + scored * counts["val"])
        return images


def plan_experiments(
    tasks: Sequence[str],
    methods: Sequence[str],
    arguments: Sequence[str],
    root: str | None,
    out: str,
    *,
    shots: Sequence[int] = (),
) -> list[Experiment]:
    """The experiments of a suite, tasks in the tables' order; ``arguments``: recipe files and overrides for all.

    ``shots``: each task and method with each of these values of data.shots; none: with the recipes' own.

    Raises UserError with all mistakes of all recipes.
    """
    from dist_vpt.recipe.loading import sets_method, split_arguments

    files, overrides = split_arguments(arguments)
    for method in methods:
        if not sets_method(_recipe_file("method", method)):
            raise UserError(f"--method {method}: sets no method; put other recipes before --tasks and --method")
    experiments, mistakes = [], []
    for (name, file), method, k in itertools.product(task_recipes(tasks), methods, shots or (None,)):
        folder = Path(out) / name / (Path(method).stem + (f"-{k}-shot" if k else ""))
        given = [*overrides, *([f"data.shots={k}"] if k else []), f"run.dir={folder}", "run.resume=auto"]
        try:
            # The method last: a recipe file of the user's may inherit another one.
            names = [file, *files, _recipe_file("method", method)]
            recipe = _load(names, given, root)
            if recipe.sweep.search == "optuna":
                raise RecipeError("sweep.search = optuna: a suite compares grids; use `dist-vpt sweep` for each task")
        except RecipeError as error:
            if root is None and "root is missing" in str(error):
                raise RecipeError("--root DIR is missing: the folder that contains the datasets") from error
            mistakes.append(f"{name} with {method}: {error}")
            continue
        experiments.append(Experiment(name, Path(method).stem, recipe, shots=k))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    names = [experiment.name for experiment in experiments]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"--tasks, --method: {twice[0]} is listed twice; list each once")
    return experiments


def _load(files: Sequence[str], overrides: Sequence[str], root: str | None) -> Recipe:
    """One recipe of a suite, with the folder of its datasets; tasks that the package has do without."""
    try:
        given = [f"data.root={root}"] if root else []
        return load_recipe(files, [*overrides, *given], protocol="published")
    except RecipeError as error:
        if root is None or "remove root or set format" not in str(error):
            raise
    return load_recipe(files, overrides, protocol="published")


def task_recipes(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Tasks and their recipes: known ones by their names or their groups', in the tables' order, then recipe files."""
    known = [name for name, row in TASKS.items() if row.group or name in EMBEDDED]
    wanted, files = set(), []
    for name in (part for argument in arguments for part in argument.split(",") if part):
        rows = [task for task in known if name == task or TASKS[task].group in GROUPS.get(name, ())]
        if not rows and not Path(name).is_file():
            raise UserError(
                f"--tasks {name}: neither a task, a group nor a recipe file; {nearest(name, [*GROUPS, *known])}"
            )
        wanted |= set(rows)
        files += [] if rows else [(Path(name).stem, name)]
    paths = {name: f"{'fgvc' if TASKS[name].group == 'fgvc' else 'vtab'}/{name}" for name in known} | EMBEDDED
    if not wanted and not files:
        raise UserError(f"--tasks {' '.join(arguments)}: names no task; {nearest('', GROUPS)}")
    found = {recipe.path: str(recipe.file) for recipe in shipped_recipes()}
    return [*((name, found[paths[name]]) for name in known if name in wanted), *files]


def show_plan(experiments: Sequence[Experiment]) -> None:
    """Print what a suite would do."""
    from rich.console import Console
    from rich.table import Table

    backbones = ", ".join({experiment.recipe.backbone_name: 1 for experiment in experiments})
    table = Table(title=f"{len(experiments)} sweeps, with backbone {backbones}")
    for column in ("", "task", "method", "trials", "seeds", "epochs", "images"):
        table.add_column(column, justify="left" if column in ("task", "method") else "right", no_wrap=True)
    for number, one in enumerate(experiments):
        images = one.images()
        seeds, shown = one.seeds, f"{images:,}" if images else "?"
        trials, epochs = (", ".join(map(str, each)) for each in zip(*one.rungs, strict=True))  # of the rungs
        table.add_row(str(number), one.task, one.trained, trials, str(seeds), epochs, shown)
    console = Console(highlight=False)
    console.print(table)
    total = sum(rung.trials for one in experiments for rung in one.rungs)
    images = sum(one.images() or 0 for one in experiments)
    seeds = sum(one.seeds for one in experiments)
    for warning in {warning: 1 for one in experiments for warning in one.recipe.warnings}:
        console.print(f"note: {warning}", markup=False)
    unknown = "; ? where the counts are not known before" if any(one.images() is None for one in experiments) else ""
    console.print(f"in all {total:,} trials and {seeds:,} seeds, {images:,} images through the backbone{unknown}")


def slurm_array(experiments: Sequence[Experiment], arguments: Sequence[str], file: Path) -> None:
    """Write a Slurm script that does each experiment as an element of a job array."""
    from dist_vpt.distributed.slurm_script import job_script

    directives = [
        "--job-name=dist-vpt-suite",
        f"--array=0-{len(experiments) - 1}",
        "--nodes=1",
        "--gpus-per-node=1",
        f"--cpus-per-task={1 + max(experiment.recipe.data.workers for experiment in experiments)}",
        "--output=slurm-%A_%a.log",
    ]
    text = job_script("dist-vpt suite --slurm", directives, ["suite_in_job", *arguments])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
        file.chmod(0o755)
    except OSError as error:
        raise UserError(f"--slurm {file}: cannot be written ({error.strerror}); name another file") from error


def check_roots(experiments: Sequence[Experiment]) -> None:
    """Raise UserError where data.root is no folder, or is one task's folder while several tasks need it."""
    data = [experiment.recipe.data for experiment in experiments]
    on_disk = (each for each in data if each.format not in ("hf", "table") and not each.streamed)
    for root in map(Path, sorted({each.root for each in on_disk if each.root})):
        if not root.expanduser().is_dir():
            raise UserError(f"--root {root}: is not a folder; name the one that contains the datasets")
        tasks = {one.task for one in experiments if one.recipe.data.root == str(root) and one.task in TASKS}
        lists = [name for name in ("train800.txt", "train.json") if (root / name).is_file()]
        if len(tasks) > 1 and lists:
            raise UserError(
                f"--root {root}: is one task's folder ({lists[0]}), and {len(tasks)} tasks are listed; name the folder "
                "that holds all of them"
            )


def with_storage(experiment: Experiment) -> Experiment:
    """The experiment with the storage format that is found below its root, which its key depends on."""
    from dist_vpt.data.config import resolve
    from dist_vpt.data.formats import stored_as

    data = experiment.recipe.data
    try:
        found = stored_as(data, resolve(data))
    except UserError:  # reported when its turn comes; the other experiments continue
        return experiment
    recipe = experiment.recipe.model_copy(update={"data": data.model_copy(update={"format": found})})
    return replace(experiment, recipe=recipe)


def record_plan(folder: Path, experiments: Sequence[Experiment]) -> None:
    """Write the manifest, or compare it with the one that is there: more experiments may come, none may change."""
    file = folder / "manifest.json"
    try:
        (folder / "claims").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {folder}: cannot be a suite's folder ({error}); choose another") from error
    with locked(folder / "claims" / "manifest", LOCK_FIX, timeout=-1):
        try:
            known = dict(read_json(file)["pairs"]) if file.is_file() else {}
            recorded = {name: entry["recipe"] for name, entry in known.items()}
        except (RunFolderError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{file}: damaged ({error}); remove it: finished experiments are kept") from error
        changed = [one.name for one in experiments if recorded.get(one.name, one.key) != one.key]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise RunFolderError(
                f"{file}: {changed[0]}{more} was begun with another recipe; choose another --out, or undo the change"
            )
        planned = {
            one.name: {
                "recipe": one.key,
                "trials": sum(rung.trials for rung in one.rungs),
                "seeds": list(one.recipe.sweep.seeds)[: one.seeds],
            }
            for one in experiments
        }
        if known | planned != known:
            with raising_disk_full("the plan", folder, RESUME_HINT):
                write_atomically(file, json.dumps({"pairs": known | planned}, indent=1) + "\n")


def _recipe_file(folder: str, name: str) -> str:
    """A recipe by its path, or by the name of a shipped one in configs/``folder``."""
    if Path(name).is_file():
        return name
    known = [recipe for recipe in shipped_recipes() if recipe.path.startswith(f"{folder}/")]
    for recipe in known:
        if name in (recipe.name, recipe.path):
            return str(recipe.file)
    names = [recipe.name for recipe in known]
    raise UserError(f"{name}: neither a file nor the name of a {folder} recipe; {nearest(name, names)}")

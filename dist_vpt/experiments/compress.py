"""``dist-vpt compress``: a VQT run's head on fewer of its features (``fixed_features.py``).

- ``compress``: a fresh head on all features, its loss raised by a group lasso, c * sum over f of ||W[:, f]||_2. The
  norms are the features' scores; the head itself is then cut to the best ones.
- ``featselect``: a fresh head on the best features alone.
- ``finetune``: from there on head and queries together, on the frozen stream.

What becomes smaller is the head, and nothing else: all queries are kept and computed, since a block's features are
brought to length 1 together. With K classes a kept feature takes 4 K bytes in the adapter file and 8 more for its
number.

    RUN/compressed/MODE-KEEP/        one fraction: a run folder, as `train` writes it
    RUN/compressed/MODE-curve.*      accuracy against the fraction kept (json, png)
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import RunFailed, RunFolderError, UserError
from dist_vpt.experiments.fixed_features import (
    Features,
    Source,
    Trained,
    best_features,
    fix_features,
    fresh_head,
    head_weight,
    score,
    train_head,
)
from dist_vpt.files import raising_disk_full, read_json, write_atomically
from dist_vpt.methods.config import VQTConfig
from dist_vpt.methods.vqt import VQT
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.recipe.differences import RESUMABLE_KEYS, differences, identity_keys
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, read_adapters, restore, write_adapters
from dist_vpt.runs.folder import GOES_ON, RunFolder
from dist_vpt.runs.provenance import device_name
from dist_vpt.runs.result import run_result, write_result
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.build_trials import build_trial_group
from dist_vpt.training.components import Components, build_components
from dist_vpt.training.trials import fit_trials, score_trials

Mode = Literal["compress", "featselect", "finetune"]


@dataclass(frozen=True)
class Fraction:
    """One fraction: its recipe, its run folder, and what it is made of besides."""

    keep: float
    features: int  # that are kept
    recipe: Recipe
    folder: RunFolder
    made_of: dict[str, Any]


@dataclass(frozen=True)
class About:
    """What a fraction's result tells of the run that it was made from."""

    source: Source
    uncompressed: dict[str, Any]  # split, number of features, size of the adapters, scores
    skipped: set[str]  # files that could not be read
    frozen: int  # numbers of the backbone
    device: str


def compress(  # noqa: PLR0917 (the options of the command)
    run: str,
    keep: Sequence[str | float],
    mode: Mode = "featselect",
    adapters: str = "last",
    lasso: float = 1e-4,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Compress a run to each fraction of ``keep`` that is not there yet; returns the content of MODE-curve.json.

    Raises UserError for a run that is not VQT's, for adapters, data or fractions that do not fit, and where a folder
    holds another compression; RunFailed for a loss that is not finite and for a full disk; Interrupted after SIGTERM or
    SIGUSR1.
    """
    fractions, console = _fractions(keep), Console(highlight=False)
    if not 0 <= lasso < math.inf:
        raise UserError(f"--lasso {lasso}: must be a number from 0 on; the published one is 1e-4")
    if LaunchEnv.current().world_size > 1:
        raise UserError("compress: works on one process; start it without accelerate launch")
    source, parts, method = open_run(run, adapters, overrides)
    augment = parts.view.augment
    into = Path(out) if out is not None else Path(run) / "compressed"
    there = next(path for path in (into, *into.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {into}: {there} is a file; name a folder")
    made_of = {"mode": mode, "lasso": lasso, "sha256": hashlib.sha256(source.adapters.read_bytes()).hexdigest()}
    job_of = partial(_job, source.recipe, method.all_features, into, made_of)
    show = partial(console.print, markup=False, soft_wrap=True)
    jobs = [job_of(fraction) for fraction in fractions]
    todo = [job for job in jobs if not _is_done(job)]
    if todo:
        with StopSignal() as stop, ExitStack() as leaving:
            accelerator = make_accelerator(source.recipe)
            leaving.callback(accelerator.end_training)
            for job in todo:
                leaving.enter_context(job.folder.claimed(job.recipe))
            features = fix_features(source, parts, method, accelerator, stop)
            about = _about(features, accelerator)
            show(f"{method.all_features:,} features of each image, from fixed queries")
            if augment != "none":
                show(f"images are shown to heads as to evaluation: without data.augment = {augment}")
            if mode == "finetune":
                together, state = _pass_of(todo, job_of)
                starts = None
                if not state.is_file():
                    starts = [made.tensors for _, made in _on_features("featselect", together, features, lasso, show)]
                del features, parts, method  # the pass has a backbone and memory of its own
                made = _finetuned(together, starts, about, accelerator, stop, state, show)
            else:
                made = _on_features(mode, todo, features, lasso, show)
            waiting = {job.keep for job in todo}
            for job, trained in made:  # each is written before the next one is begun
                if job.keep in waiting:
                    with raising_disk_full("the results", job.folder.path, GOES_ON):
                        _write_run(job, trained, about)
    if mode == "finetune":
        _forget_passes(jobs[0], job_of)
    with raising_disk_full("the curve", into, GOES_ON):
        return _conclude(into, jobs, job_of, console)


def open_run(run: str, adapters: str, overrides: Sequence[str]) -> tuple[Source, Components, VQT]:
    """A VQT run with its adapters in place. Raises UserError where it is none, or is not of this data."""
    folder = RunFolder(run)
    folder.refuse_sweep()
    recipe = folder.load(overrides)
    if folder.load().method.name != "vqt" or not isinstance(recipe.method, VQTConfig):
        name = folder.load().method.name
        raise UserError(
            f"{run}: method.name = {name}: only a vqt run has features to choose among; name one, and leave its method"
        )
    if recipe.method.keep is not None:
        raise UserError(
            f"{run}: method.keep = {recipe.method.keep}: is compressed already; name the run that it was made from"
        )
    path = folder.best if adapters == "best" else folder.adapters
    tensors, facts = read_adapters(path)
    parts = build_components(recipe)
    assert isinstance(parts.method, VQT)
    if list(parts.splits.classes) != facts.get("classes"):
        raise UserError(f"{run}: was trained on other classes than {recipe.data.task} has here; mend data.root")
    restore(parts.method, tensors, path)
    scored = "test" if recipe.train.test else "val"
    if scored == "val" and recipe.data.train_on != "train":
        raise UserError(
            "train.test = false: with data.train_on = trainval nothing is left to score; set train.test=true"
        )
    parts.splits[scored]  # a missing one is told now
    return Source(recipe, path, tensors, parts.splits.classes, scored), parts, parts.method


def _on_features(
    mode: Mode, jobs: Sequence[Fraction], f: Features, lasso: float, show: Callable[[str], None]
) -> Iterator[tuple[Fraction, Trained]]:
    """Each job with what `compress` or `featselect` makes of it. The backbone is not asked."""
    everything = fresh_head(f, f.source.recipe)
    scoring = train_head(f, everything, lasso)
    show(f"group lasso of weight {lasso:g}: {scoring.last['epoch']} epochs in {scoring.seconds:.1f} s")
    for job in jobs:
        kept = best_features(head_weight(everything), job.features)
        reader = fresh_head(f, job.recipe, kept)
        if mode == "compress":
            cut = {
                **collect(reader),
                "head.weight": scoring.tensors["head.weight"][:, kept],
                "head.bias": scoring.tensors["head.bias"],
            }
            restore(reader, cut, job.folder.path)
            last = {"epoch": scoring.last["epoch"]}
            if f.val is not None:
                last["val"] = score(f, reader, f.val)
            trained = Trained(cut, last, {}, {}, scoring.seconds, scoring.images)
        else:
            trained = train_head(f, reader)
        # Not written into last itself, which may be the best epoch, too.
        last = {**trained.last, f.source.scored: score(f, reader, f.scored)}
        yield job, replace(trained, last=last)


def _pass_of(todo: Sequence[Fraction], job_of: Callable[[float], Fraction]) -> tuple[Sequence[Fraction], Path]:
    """The fractions that `finetune` trains together, and the file of their state while it is under way.

    What was ended before all of its fractions were told is gone on with as the whole that it was.
    """
    for fractions, file in _passes(todo[0]):
        if fractions.issuperset(job.keep for job in todo):
            return [job_of(fraction) for fraction in sorted(fractions, reverse=True)], file
    told = "_".join(str(job.keep) for job in todo)
    return todo, todo[0].folder.path.parent / f"{_pass_name(todo[0])}_{told}.pt"


def _passes(job: Fraction) -> list[tuple[set[float], Path]]:
    """Passes of fractions that are made as this one, by their fractions, with their states."""
    files = job.folder.path.parent.glob(f"{_pass_name(job)}_*.pt")
    return [({float(word) for word in file.stem.split("_")[1:]}, file) for file in files]


def _pass_name(job: Fraction) -> str:
    facts = [job.made_of, {key: value for key, value in identity_keys(job.recipe).items() if key != "method.keep"}]
    return f".finetune-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"


def _forget_passes(job: Fraction, job_of: Callable[[float], Fraction]) -> None:
    """Remove states, and what killed writes have left of them, of passes whose fractions are all there."""
    for fractions, file in _passes(job):
        if all(_is_done(job_of(fraction)) for fraction in fractions):
            for left in (file, *file.parent.glob(f".{file.name}.*.tmp")):
                left.unlink(missing_ok=True)


def _finetuned(  # noqa: PLR0917 (what a pass is made of)
    jobs: Sequence[Fraction],
    starts: Sequence[dict[str, Tensor]] | None,
    about: About,
    accelerator: Accelerator,
    stop: StopSignal,
    state: Path,
    show: Callable[[str], None],
) -> Iterator[tuple[Fraction, Trained]]:
    """Each job with queries and head trained on from `featselect`'s, all in one pass over the frozen stream.

    Raises Interrupted, with the state saved, after SIGTERM or SIGUSR1.
    """
    recipes = [job.recipe for job in jobs]
    with advice_on_memory(recipes[0], accelerator, trials=len(jobs)):
        p = build_trial_group(
            recipes, accelerator, stop, state, show, starts, keeps_best=True, check_memory=check_memory
        )
        try:
            fit_trials(p)
            alive = [(job, trial) for job, trial in zip(jobs, p.trials, strict=True) if not trial.diverged]
            if about.source.scored == "test" and alive:
                for (_, trial), scores in zip(alive, score_trials(p, [t for _, t in alive], "test"), strict=True):
                    trial.progress.last = {**trial.progress.last, "test": scores.compute()}
        finally:
            p.close()
    about.skipped.update(p.skipped)
    for job, trial in alive:
        progress, seconds = trial.progress, p.seconds / len(jobs)
        yield job, Trained(collect(trial.reader), progress.last, progress.best, trial.best, seconds, progress.images)
    if len(alive) < len(jobs):
        said = "; ".join(
            f"{job.folder.path}: {t.diverged}" for job, t in zip(jobs, p.trials, strict=True) if t.diverged
        )
        state.unlink(missing_ok=True)
        raise RunFailed(
            f"{said}; choose another --out, and a lower optim.lr, a longer optim.warmup_epochs or an optim.clip_norm"
        )


def _about(f: Features, accelerator: Accelerator) -> About:
    uncompressed = {
        "split": f.source.scored,
        "features": f.method.all_features,
        "bytes": f.source.adapters.stat().st_size,
        **score(f, f.method, f.scored),
    }
    frozen = sum(p.numel() for p in f.method.backbone.parameters())
    return About(f.source, uncompressed, set(f.skipped), frozen, device_name(accelerator.device))


def _write_run(job: Fraction, trained: Trained, about: About) -> None:
    """A fraction as the run folder that `train` would have written of it, for eval and predict."""
    folder, facts = job.folder, {"recipe": job.recipe.model_dump(mode="json"), "classes": list(about.source.classes)}
    write_adapters(folder.adapters, trained.tensors, facts | {"epoch": trained.last["epoch"]})
    if trained.best_tensors:
        write_adapters(folder.best, trained.best_tensors, facts | {"epoch": trained.best["epoch"]})
    own = sum(t.numel() for t in trained.tensors.values() if t.is_floating_point())
    result = run_result(
        job.recipe,
        last=trained.last,
        best=trained.best,
        compression={
            **job.made_of,
            "source": str(about.source.adapters),
            "keep": job.keep,
            "features": job.features,
            "bytes": folder.adapters.stat().st_size,
            "uncompressed": about.uncompressed,
        },
        seconds=trained.seconds,
        images_per_s=trained.images / max(trained.seconds, 1e-9),
        parameters={"trained": own, "total": own + about.frozen},
        skipped=about.skipped,
        device=about.device,
        processes=1,
    )
    write_result(folder, result)
    folder.mark("done")


def curve_figure(curve: dict[str, Any]) -> Any:
    """Accuracy against the share of features kept, beside the uncompressed run's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, points = figure.subplots(), curve["points"]
    axes.plot([100 * p["keep"] for p in points], [p["top1"] for p in points], "o-", label=curve["mode"])
    axes.axhline(curve["uncompressed"]["top1"], linestyle="--", color="gray", label="uncompressed")
    axes.set(xlabel="features kept (%)", ylabel=f"{curve['split']} top-1 (%)", title=f"{curve['mode']} of a VQT head")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _job(recipe: Recipe, features: int, into: Path, made_of: dict[str, Any], keep: float) -> Fraction:
    assert isinstance(recipe.method, VQTConfig)
    kept, path = max(1, round(keep * features)), into / f"{made_of['mode']}-{keep}"
    method = recipe.method.model_copy(update={"keep": kept})
    run = recipe.run.model_copy(update={"dir": str(path), "resume": "auto"})
    return Fraction(keep, kept, recipe.model_copy(update={"method": method, "run": run}), RunFolder(path), made_of)


def _is_done(job: Fraction) -> bool:
    """Whether a fraction is there. Raises RunFolderError where its folder holds something else."""
    folder = job.folder
    if folder.status().get("status") != "done":
        return False
    absent = [path.name for path in (folder.result, folder.adapters) if not path.is_file()]
    if absent:
        raise RunFolderError(f"{folder.path}: is done, but {' and '.join(absent)} is missing; remove this folder")
    changed = _changes(job)
    if changed:
        raise RunFolderError(
            f"{folder.path}: holds another compression; choose another --out, remove this folder, or undo:\n"
            + "\n".join(f"  {change}" for change in changed)
        )
    return True


def _changes(job: Fraction) -> list[str]:
    """What a job differs in from the run that lies in its folder."""
    found = read_json(job.folder.result).get("compression", {})
    changed = [f"{key}: {found.get(key)} -> {value}" for key, value in job.made_of.items() if found.get(key) != value]
    return changed + [d for d in differences(job.folder.load(), job.recipe) if not d.startswith(RESUMABLE_KEYS)]


def _conclude(
    into: Path, jobs: Sequence[Fraction], job_of: Callable[[float], Fraction], console: Console
) -> dict[str, Any]:
    """Write and show the curve through these fractions and those that were made alike before."""
    mode, every = jobs[0].made_of["mode"], {job.keep: job for job in jobs}
    for file in into.glob(f"{mode}-*/result.json"):
        keep = read_json(file).get("compression", {}).get("keep")
        if keep is not None and keep not in every:
            job = job_of(keep)
            if job.folder.result == file and job.folder.status().get("status") == "done" and not _changes(job):
                every[keep] = job
    runs = [(str(job.folder.path), read_json(job.folder.result)) for _, job in sorted(every.items(), reverse=True)]
    uncompressed = runs[0][1]["compression"]["uncompressed"]
    curve = {
        **jobs[0].made_of,
        "split": uncompressed["split"],
        "uncompressed": uncompressed,
        "points": [
            {
                **{key: result["compression"][key] for key in ("keep", "features", "bytes")},
                **result["last"][uncompressed["split"]],
                "run": path,
            }
            for path, result in runs
        ],
    }
    picture = io.BytesIO()
    curve_figure(curve).savefig(picture, format="png", dpi=120)
    write_atomically(into / f"{mode}-curve.png", picture.getvalue())
    write_atomically(into / f"{mode}-curve.json", json.dumps(curve, indent=1) + "\n")
    _print(curve, console)
    console.print(str(into / f"{mode}-curve.json"), markup=False, soft_wrap=True)
    return curve


def _print(curve: dict[str, Any], console: Console) -> None:
    whole = curve["uncompressed"]
    table = Table(title=f"{curve['mode']}: {curve['split']} top-1 by the share of features kept")
    for column in ("kept", "features", "size, KiB", "size, %", "top-1, %", "difference"):
        table.add_column(column, justify="right")
    table.add_row(
        "uncompressed", f"{whole['features']:,}", f"{whole['bytes'] / 1024:.1f}", "", f"{whole['top1']:.2f}", ""
    )
    for point in curve["points"]:
        table.add_row(
            str(point["keep"]),
            f"{point['features']:,}",
            f"{point['bytes'] / 1024:.1f}",
            f"{100 * point['bytes'] / whole['bytes']:.0f}",
            f"{point['top1']:.2f}",
            f"{point['top1'] - whole['top1']:+.2f}",
        )
    console.print(table)


def _fractions(words: Sequence[str | float]) -> list[float]:
    """Shares of the features, the largest first, each once. Raises UserError for what is none."""
    fractions, wrong = set(), []
    for word in words:
        try:
            fraction = float(word)
        except ValueError:
            fraction = math.nan
        if 0 < fraction <= 1:
            fractions.add(fraction)
        else:
            wrong.append(str(word))
    if wrong or not fractions:
        raise UserError(
            f"--keep {' '.join(wrong)}: must be shares of the features, above 0 and at most 1, such as --keep 0.7 0.5"
        )
    return sorted(fractions, reverse=True)

"""The three ways to train a fraction of a run's features, and the run folder that is written of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import RunFailed
from dist_vpt.experiments.compress_fractions import Fraction, FractionOf, finetune_group
from dist_vpt.experiments.fixed_features import (
    Features,
    Source,
    Trained,
    best_features,
    fresh_head,
    head_weight,
    score,
    score_at_end,
    train_head,
)
from dist_vpt.planning.planner import advice_on_memory, check_memory
from dist_vpt.runs.adapters import collect, restore, write_adapters
from dist_vpt.runs.provenance import device_name
from dist_vpt.runs.result import run_result, write_result
from dist_vpt.training.build_trials import build_trial_group
from dist_vpt.training.final_scores import score_trials_at_end
from dist_vpt.training.trials import fit_trials

Mode = Literal["compress", "featselect", "finetune"]


@dataclass(frozen=True)
class About:
    """Facts about the source run for the results of its fractions."""

    source: Source
    uncompressed: dict[str, Any]  # split, number of features, size of the adapters, scores
    skipped: set[str]  # files that could not be read
    frozen: int  # numbers of the backbone
    device: str


def describe_source(f: Features, accelerator: RankAccelerator) -> About:
    """Score the run with all its features, and count what its results report."""
    uncompressed = {
        "split": f.source.scored,
        "features": f.method.all_features,
        "bytes": f.source.adapters.stat().st_size,
        **score(f, f.method, f.scored),
    }
    frozen = sum(p.numel() for p in f.method.backbone.parameters())
    return About(f.source, uncompressed, set(f.skipped), frozen, device_name(accelerator.device))


def train_fractions(  # noqa: PLR0917 (what a compression is made of)
    mode: Mode,
    fractions: Sequence[Fraction],
    fraction_of: FractionOf,
    features: Features,
    about: About,
    lasso: float,
    accelerator: RankAccelerator,
    stop: StopSignal,
    show: Callable[[str], None],
) -> Iterator[tuple[Fraction, Trained]]:
    """Each fraction as the mode makes it, one after the other."""
    if mode != "finetune":
        yield from train_on_features(mode, fractions, features, lasso, show)
        return
    group, state = finetune_group(fractions, fraction_of)
    starts = None
    if not state.is_file():
        starts = [made.tensors for _, made in train_on_features("featselect", group, features, lasso, show)]
    del features  # the trial group has a backbone and memory of its own
    yield from finetune(group, starts, about, accelerator, stop, state, show)


def train_on_features(
    mode: Mode, fractions: Sequence[Fraction], f: Features, lasso: float, show: Callable[[str], None]
) -> Iterator[tuple[Fraction, Trained]]:
    """Each fraction as `compress` or `featselect` makes it, without another forward pass of the backbone."""
    everything = fresh_head(f, f.source.recipe)
    scoring = train_head(f, everything, lasso)
    show(f"group lasso of weight {lasso:g}: {scoring.last['epoch']} epochs in {scoring.seconds:.1f} s")
    for fraction in fractions:
        kept = best_features(head_weight(everything), fraction.features)
        reader = fresh_head(f, fraction.recipe, kept)
        if mode == "compress":
            cut = {
                **collect(reader),
                "head.weight": scoring.tensors["head.weight"][:, kept],
                "head.bias": scoring.tensors["head.bias"],
            }
            restore(reader, cut, fraction.folder.path)
            last = {"epoch": scoring.last["epoch"]}
            if f.val is not None:
                last["val"] = score(f, reader, f.val)
            trained = Trained(cut, last, {}, {}, scoring.seconds, scoring.images)
        else:
            trained = train_head(f, reader)
        # A copy, since last may be the best epoch's dict, too.
        last = {**trained.last, **score_at_end(f, reader)}
        yield fraction, replace(trained, last=last)


def finetune(  # noqa: PLR0917 (what a trial group is made of)
    fractions: Sequence[Fraction],
    starts: Sequence[dict[str, Tensor]] | None,
    about: About,
    accelerator: RankAccelerator,
    stop: StopSignal,
    state: Path,
    show: Callable[[str], None],
) -> Iterator[tuple[Fraction, Trained]]:
    """Each fraction with queries and head trained further from `featselect`'s, all in one pass over the frozen stream.

    Raises Interrupted, with the state saved, after a stop signal.
    """
    recipes = [fraction.recipe for fraction in fractions]
    with advice_on_memory(recipes[0], accelerator, trials=len(fractions)):
        group = build_trial_group(
            recipes, accelerator, stop, state, show, starts, keeps_best=True, check_memory=check_memory
        )
        try:
            fit_trials(group)
            pairs = list(zip(fractions, group.trials, strict=True))
            finite = [(fraction, trial) for fraction, trial in pairs if not trial.diverged]
            if about.source.scored == "test" and finite:
                for _, trial in finite:
                    trial.progress.last = dict(trial.progress.last)  # which may be the best epoch's dict, too
                score_trials_at_end(group, [trial for _, trial in finite])
        finally:
            group.close()
    about.skipped.update(group.skipped)
    for fraction, trial in finite:
        progress, seconds = trial.progress, group.seconds / len(fractions)
        tensors = collect(trial.reader)
        yield fraction, Trained(tensors, progress.last, progress.best, trial.best, seconds, progress.images)
    diverged = [f"{fraction.folder.path}: {trial.diverged}" for fraction, trial in pairs if trial.diverged]
    if diverged:
        state.unlink(missing_ok=True)
        raise RunFailed(
            f"{'; '.join(diverged)}; choose another --out, and a lower optim.lr, a longer optim.warmup_epochs or an "
            "optim.clip_norm"
        )


def write_run(job: Fraction, trained: Trained, about: About) -> None:
    """Write a fraction as a run folder, as `train` writes it, for eval and predict."""
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

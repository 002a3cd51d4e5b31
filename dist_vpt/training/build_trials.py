"""From recipes to trials of a reader that share one frozen backbone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.methods.base import Reader
from dist_vpt.methods.fitted import FittedReader
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import restore
from dist_vpt.runs.progress import Progress
from dist_vpt.runtime.peak_memory import free_and_reset_peak
from dist_vpt.training.components import Components, build_components, build_reader
from dist_vpt.training.fitting import FittedGroup
from dist_vpt.training.trial_state import Trial, read_trials
from dist_vpt.training.trials import TrialGroup

PER_TRIAL_KEYS = (
    *("seed", "optim.lr", "optim.weight_decay", "method.dropout", "method.queries", "run.dir"),
    *("method.k", "method.temperature", "method.c", "method.group_penalty"),
)


def build_trial_group(  # noqa: PLR0917 (as a sweep and a compression see it)
    recipes: Sequence[Recipe],
    accelerator: RankAccelerator,
    stop: StopSignal,
    state: Path,
    show: Callable[[str], None],
    starts: Sequence[dict[str, Tensor]] | None = None,
    *,
    keeps_best: bool = False,
    check_memory: Callable[[Recipe, RankAccelerator, int], str] = lambda *_: "",
) -> TrialGroup:
    """Build the trials of ``recipes`` on one frozen backbone, restore ``state``, cache the stream.

    Trials begin with the tensors of ``starts``, where given. ``keeps_best``: hold and save each trial's tensors of its
    best epoch on val, too. ``check_memory``: planning.planner's; it raises UserError where a trial does not fit, or
    returns a warning. A collective call of the accelerator's processes. Raises UserError as a single run would.
    """
    recipe, rank, world = recipes[0], accelerator.process_index, accelerator.num_processes
    free_and_reset_peak()
    parts = build_components(recipe, accelerator.launch)
    classes = len(parts.splits.classes)
    show(check_memory(recipe, accelerator, classes))  # of one trial: all together hold more
    train = parts.training(rank, world)
    val = parts.validation(rank, world)
    first = parts.method.to(accelerator.device)
    assert isinstance(first, Reader)
    readers = [first, *(build_reader(each, first.backbone, classes) for each in recipes[1:])]
    trials = [Trial(each, reader.to(accelerator.device)) for each, reader in zip(recipes, readers, strict=True)]
    if starts is None:
        parts.init_method(accelerator.device, readers[1:])
    for trial, tensors in zip(trials, starts or [], strict=starts is not None):
        restore(trial.reader, tensors, state)
    _check_fit(trials, parts)
    group = (FittedGroup if recipe.method.fitted else TrialGroup)(
        recipe=recipe,
        accelerator=accelerator,
        train=train,
        val=val,
        class_weights=parts.class_weights(accelerator.device),
        guessing=parts.guessing(),
        stop=stop,
        trials=trials,
        parts=parts,
        state=state,
        show=show,
        keeps_best=keeps_best,
    )
    _resume(group)  # before the stream is computed: it may raise
    group.start_epoch()  # methods that cannot be trained raise here
    if not group.ended and group.epoch < recipe.train.epochs:  # else it was stopped after its end
        show(parts.use_cached_stream(accelerator, train, val, stop, shared=len(recipes) > 1))
    return group


def _check_fit(trials: Sequence[Trial], parts: Components) -> None:
    """Raises UserError where the labels that are trained on are not enough for readers that are fitted."""
    readers = [trial.reader for trial in trials if isinstance(trial.reader, FittedReader)]
    if readers:
        labels_n = torch.from_numpy(parts.splits[parts.recipe.data.train_on].labels)
        try:
            type(readers[0]).check_fit(readers, labels_n)
        except UserError as error:
            error.shared = True  # all processes read the same labels
            raise


def _resume(group: TrialGroup) -> None:
    """Continue from the saved state, if process 0 has one. Raises RunFolderError on all processes."""
    if not broadcast_object_list([group.state.is_file()])[0]:
        return
    refused: UserError | None = None
    try:
        shared = read_trials(group.state, group.trials)
        group.skipped = set(shared.pop("skipped"))
        group.progress = Progress(**shared)
    except RunFolderError as damaged:
        refused = damaged
    raise_on_any_rank(group.accelerator, refused)
    group.show(f"resumed from {group.state} at epoch {group.epoch + 1}")

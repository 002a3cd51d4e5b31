"""Many trials of a reader in one pass over the frozen stream, each what it would be alone.

B images of a micro-batch, n of a split, K classes, T trials.

A trial has a recipe, an initialisation, an optimiser, clipping, in fp16 a gradient scale, and an end of its own; the
data order, the stream and the loop are shared. The loss is the sum of the trials' losses, so that each one's gradient
is exactly its own.
"""

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.distributed.collectives import all_reduce_sum, raise_on_any_rank, stop_all_ranks
from dist_vpt.distributed.rank_status import phase
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted, RunFailed, RunFolderError, UserError
from dist_vpt.files import write_atomically
from dist_vpt.frozen_stream.observe import StreamOutput, compute_stream
from dist_vpt.methods.base import Reader
from dist_vpt.planning.planner import check_memory
from dist_vpt.recipe.differences import identity_keys
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.runs.progress import Progress
from dist_vpt.runtime.peak_memory import free_and_reset_peak
from dist_vpt.training.components import Components, build_components, build_reader, class_weights
from dist_vpt.training.engine import MAY_FAIL, fold_in, global_weight, next_or_error
from dist_vpt.training.metrics import Scores
from dist_vpt.training.optim import build_optimizer, multiplier, set_lr

SAVE_SECONDS = 30.0  # at least so long between states saved at the ends of epochs
PER_TRIAL_KEYS = ("seed", "optim.lr", "optim.weight_decay", "method.dropout", "method.queries", "run.dir")


@dataclass
class Trial:
    """One setting of a sweep."""

    recipe: Recipe
    reader: Reader
    optimizer: torch.optim.Optimizer
    scaler: GradScaler  # does nothing unless the stream is of fp16
    progress: Progress = field(default_factory=Progress)
    diverged: str = ""  # why it was ended
    best: dict[str, Tensor] = field(default_factory=dict)  # trained tensors of the best epoch on val, where kept

    @property
    def running(self) -> bool:
        return not self.diverged and not self.progress.ended


@dataclass
class TrialGroup:
    """Trials that are trained together, and what they share."""

    trials: list[Trial]
    parts: Components
    accelerator: Accelerator
    train: TrainBatches
    val: EvalBatches | None
    class_weights: Tensor  # [K]
    stop: StopSignal
    state: Path  # file of the pass's state while it is under way
    show: Callable[[str], None]
    keeps_best: bool = False
    skipped: set[str] = field(default_factory=set)  # files that no process could read
    epoch: int = 0
    step: int = 0  # of the epoch
    seconds: float = 0.0
    failures: int = 0  # saves in a row that failed

    @property
    def recipe(self) -> Recipe:
        """Of the first trial; all have it in common but for MAY_DIFFER."""
        return self.trials[0].recipe

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.running]

    def close(self) -> None:
        """End the workers that load images."""
        self.train.close()
        if self.val is not None:
            self.val.close()


def build_trial_group(  # noqa: PLR0917 (as a sweep and a compression see it)
    recipes: Sequence[Recipe],
    accelerator: Accelerator,
    stop: StopSignal,
    state: Path,
    show: Callable[[str], None],
    starts: Sequence[dict[str, Tensor]] | None = None,
    *,
    keeps_best: bool = False,
) -> TrialGroup:
    """Build the trials of ``recipes`` on one frozen backbone, go back to ``state``, cache the stream as they say.

    Trials begin with the tensors of ``starts``, where given. ``keeps_best``: hold and save each trial's tensors of its
    best epoch on val, too. A collective call of the accelerator's processes. Raises UserError as a single run would.
    """
    recipe, rank, world = recipes[0], accelerator.process_index, accelerator.num_processes
    free_and_reset_peak()
    parts = build_components(recipe)
    show(check_memory(recipe, accelerator, len(parts.splits.classes)))  # of one trial: all together hold more
    train = parts.training(recipe, rank, world)
    val = parts.evaluation("val", rank, world) if recipe.data.train_on == "train" and parts.splits.val else None
    first = parts.method.to(accelerator.device)
    assert isinstance(first, Reader)
    readers = [first, *(build_reader(each, first.backbone, len(parts.splits.classes)) for each in recipes[1:])]
    trials = [
        Trial(
            each,
            reader.to(accelerator.device),
            build_optimizer(each.optim, reader),
            gradient_scaler(recipe, accelerator),
        )
        for each, reader in zip(recipes, readers, strict=True)
    ]
    for trial, tensors in zip(trials, starts or [], strict=starts is not None):
        restore(trial.reader, tensors, state)
    labels = parts.splits[recipe.data.train_on].labels
    weights_K = class_weights(recipe.train.class_weights, labels, len(parts.splits.classes)).to(accelerator.device)
    made = TrialGroup(trials, parts, accelerator, train, val, weights_K, stop, state, show, keeps_best)
    # All that can be refused is, before the stream is computed. Main says whether there is a state.
    if broadcast_object_list([state.is_file()])[0]:
        refused: UserError | None = None
        try:
            _load(made)
        except RunFolderError as damaged:
            refused = damaged
        raise_on_any_rank(accelerator, refused)
        show(f"resumed from {state} at epoch {made.epoch + 1}")
    for trial in trials:
        trial.reader.train()  # what cannot be trained says so
    if made.running and made.epoch < recipe.train.epochs:  # else it was stopped after its end, and reads no more
        show(parts.use_cached_stream(recipe, accelerator, train, val, stop, shared=len(recipes) > 1))
    return made


def gradient_scaler(recipe: Recipe, accelerator: Accelerator) -> GradScaler:
    """A trial's own: as Accelerate's in a single run, with another overflow in each trial."""
    return GradScaler(accelerator.device.type, enabled=recipe.runtime.precision == "fp16")


def step_trials(p: TrialGroup, fetched: list[Batch] | DataError) -> None:
    """One optimiser step of every running trial on one global batch. A collective call."""
    recipe, accelerator, running = p.recipe, p.accelerator, p.running
    number = p.epoch * p.train.steps_per_epoch + p.step
    batches = [] if isinstance(fetched, DataError) else [send_to_device(b, accelerator.device) for b in fetched]
    weights = [p.class_weights[batch["labels"]] * batch["weight"] for batch in batches]
    weight = global_weight(accelerator, p.stop, weights, fetched)
    phase.at(f"step {number}", "training", limited=True)
    sums = torch.zeros(len(running), 2)  # loss and right answers of each trial
    images = 0.0
    for micro, (batch, weights_B) in enumerate(zip(batches, weights, strict=True)):
        seeds = [fold_in(t.recipe.seed, number, accelerator.process_index, micro) for t in running]
        logits_TBK = torch.stack(read(running, _observed(p, batch), seeds))
        losses_TB, right_TB = _losses(logits_TBK, batch["labels"], recipe.train.label_smoothing)
        losses_T, right_T = (losses_TB * weights_B).sum(1), (right_TB * batch["weight"]).sum(1)
        told = torch.cat([losses_T.detach(), right_T, batch["weight"].sum()[None]])
        told = accelerator.reduce(told, "sum").cpu()
        sums += told[:-1].view(2, -1).T
        images += float(told[-1])
        for t, trial in enumerate(running):
            _check_finite(trial, "loss", float(told[t]), number)
        # What is not finite stays in its own trial, whose gradient nobody asks for.
        alive = [trial.scaler.scale(loss) for trial, loss in zip(running, losses_T, strict=True) if trial.running]
        if alive:
            (torch.stack(alive).sum() / weight).backward()
    _sum_gradients(p, running)
    _update(p, number)
    for t, trial in enumerate(running):
        trial.optimizer.zero_grad()
        if trial.running:
            trial.progress.count(float(sums[t, 0]) / weight, float(sums[t, 1]), images)


def fit_trials(p: TrialGroup) -> None:
    """Train to the end; each trial is scored on val (if there is one) after the epochs that the recipe says.

    Raises Interrupted, with the state saved, after SIGTERM or SIGUSR1, and RunFailed where the disk stays full.
    """
    recipe, began, saved = p.recipe, time.monotonic() - p.seconds, time.monotonic()
    while p.epoch < recipe.train.epochs and p.running:
        for trial in p.trials:
            trial.reader.train()
        batches = p.train.epoch(p.epoch, p.step)
        while p.step < p.train.steps_per_epoch and p.running:
            phase.at(f"step {p.epoch * p.train.steps_per_epoch + p.step}", "reading images")
            step_trials(p, next_or_error(batches))
            p.step += 1
            p.seconds = time.monotonic() - began
            phase.progress = _progress(p)
            if p.stop.agreed:
                stop_all_ranks(p.accelerator, f"{p.state}: stopped {_save(p)}")
            every, done = recipe.run.save_every, p.epoch * p.train.steps_per_epoch + p.step
            if every and done % every == 0 and p.step < p.train.steps_per_epoch:
                _save(p)
        try:
            _end_epoch(p)
        except Interrupted:  # as of the epoch's last step: gone on with, its trials are scored
            p.seconds = time.monotonic() - began
            stop_all_ranks(p.accelerator, f"{p.state}: stopped while val was scored, {_save(p)}")
        p.seconds = time.monotonic() - began
        over = p.epoch == recipe.train.epochs or not p.running
        due = p.accelerator.is_main_process and time.monotonic() - saved > SAVE_SECONDS  # others' clocks differ
        if over or all_reduce_sum(p.accelerator, due)[0]:
            _save(p)
            saved = time.monotonic()
    phase.progress = {}


def _progress(p: TrialGroup) -> dict[str, float]:
    """How far a pass is, for ``dist-vpt status``."""
    done, steps = p.epoch * p.train.steps_per_epoch + p.step, p.recipe.train.epochs * p.train.steps_per_epoch
    return {
        "step": done,
        "steps": steps,
        "epoch": p.epoch + 1,
        "epochs": p.recipe.train.epochs,
        "trials": len(p.trials),
        "seconds": round(p.seconds, 3),
        "seconds_left": round(p.seconds / done * (steps - done), 3),
        "images_per_s": round(max(trial.progress.images for trial in p.trials) / p.seconds, 2),
    }


@torch.no_grad()
def score_trials(p: TrialGroup, trials: Sequence[Trial], split: str) -> list[Scores]:
    """Stream a split once through the backbone and score it with all trials. A collective call."""
    phase.at("the end", f"scoring {split}")
    batches = p.parts.evaluation(split, p.accelerator.process_index, p.accelerator.num_processes)
    scores = [Scores(len(p.parts.splits.classes), p.accelerator.device) for _ in trials]
    try:
        for batch, logits in _passed(p, trials, batches):
            for score, each_BK in zip(scores, logits, strict=True):
                score.update(each_BK, batch["labels"], batch["weight"], batch["index"])
    finally:
        batches.close()
    p.skipped |= set(gather_object(sorted(batches.skipped)))
    return scores


def read(trials: Sequence[Trial], observed: StreamOutput, seeds: Sequence[int] | None = None) -> list[Tensor]:
    """Logits [B, K] of each trial."""
    readers = [trial.reader for trial in trials]
    return type(readers[0]).read_many(readers, observed, seeds)


def _losses(logits_TBK: Tensor, labels_B: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Loss of each image in each trial, and whether it is right, [T, B]."""
    labels_TB = labels_B.expand(len(logits_TBK), -1)
    losses = F.cross_entropy(logits_TBK.flatten(0, 1), labels_TB.flatten(), reduction="none", label_smoothing=smoothing)
    return losses.view_as(labels_TB), logits_TBK.argmax(2) == labels_B


def _observed(p: TrialGroup, batch: Batch) -> StreamOutput:
    images, reader = batch["images"], p.trials[0].reader
    return images if isinstance(images, StreamOutput) else compute_stream(reader.backbone, images, reader.spec)


def _passed(p: TrialGroup, trials: Sequence[Trial], batches: EvalBatches) -> Any:
    """Each batch of a split with the logits of every trial. Raises Interrupted where a stop was asked."""
    for trial in trials:
        trial.reader.eval()
    unread = iter(batches)
    for _ in range(len(batches)):
        fetched = next_or_error(unread)
        raise_on_any_rank(p.accelerator, fetched if isinstance(fetched, DataError) else None, p.stop)
        if p.stop.agreed:
            stop_all_ranks(p.accelerator, f"{p.state}: stopped while a split was scored; the same command goes on")
        batch = send_to_device(fetched, p.accelerator.device)
        yield batch, read(trials, _observed(p, batch))


def _check_finite(trial: Trial, name: str, value: float, step: int) -> None:
    if not math.isfinite(value) and not trial.diverged:
        trial.diverged = f"the {name} was {value} at step {step}"


def _sum_gradients(p: TrialGroup, running: Sequence[Trial]) -> None:
    """Gradients over all processes, in one message."""
    if p.accelerator.num_processes == 1:
        return
    gradients = [
        q.grad for trial in running if trial.running for _, q in trial.reader.trainable() if q.grad is not None
    ]
    if not gradients:
        return
    flat = p.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _update(p: TrialGroup, step: int) -> None:
    """Clip and step each trial as it would be alone."""
    trials, optim, train = p.running, p.recipe.optim, p.recipe.train
    if not trials:
        return
    share = multiplier(optim, step, p.train.steps_per_epoch, train.epochs)
    parameters = [[parameter for _, parameter in trial.reader.trainable()] for trial in trials]
    for trial in trials:
        trial.scaler.unscale_(trial.optimizer)
    norms_T = torch.stack([get_total_norm([q.grad for q in each if q.grad is not None]) for each in parameters])
    for trial, each, norm, told in zip(trials, parameters, norms_T, norms_T.tolist(), strict=True):
        if not trial.scaler.is_enabled():  # it meets an overflow by a skipped step and a smaller scale
            _check_finite(trial, "gradient norm", told, step)
        if not trial.running:
            continue
        if optim.clip_norm is not None:
            clip_grads_with_norm_(each, optim.clip_norm, norm)
        set_lr(trial.optimizer, trial.recipe.optim.peak_lr(train.batch_size) * share)
        trial.scaler.step(trial.optimizer)
        trial.scaler.update()


def _end_epoch(p: TrialGroup) -> None:
    recipe, ended, done = p.recipe, p.running, p.epoch + 1
    found: list[dict[str, float]] = []
    if p.val is not None and ended and (done == recipe.train.epochs or done % recipe.train.eval_every == 0):
        phase.at(f"epoch {done}", "scoring val")
        found = _quick_scores(p, ended, p.val)  # before the epoch ends: after a stop it is still to be scored
    p.epoch, p.step = done, 0
    for trial in ended:
        trial.progress.end_epoch()
    if not found:
        return
    for trial, scores in zip(ended, found, strict=True):
        _check_finite(trial, "loss on val", scores["loss"], p.epoch * p.train.steps_per_epoch)
        if trial.running and trial.progress.scored(scores, recipe.train.early_stop) and p.keeps_best:
            trial.best = collect(trial.reader)
    top1 = [trial.progress.last["val"]["top1"] for trial in ended if not trial.diverged]
    shown = f"{min(top1):.2f} to {max(top1):.2f} %" if top1 else "all diverged"
    p.show(f"epoch {p.epoch}/{recipe.train.epochs}  val top1 of {len(top1)} trials: {shown}")


@torch.no_grad()
def _quick_scores(p: TrialGroup, trials: Sequence[Trial], batches: EvalBatches) -> list[dict[str, float]]:
    """Loss and top-1 of each trial; all other scores are for the end."""
    sums_3T = torch.zeros(3, len(trials), device=p.accelerator.device)
    for batch, logits in _passed(p, trials, batches):
        losses_TB, right_TB = _losses(torch.stack(logits), batch["labels"])
        counts_B = batch["weight"]
        sums_3T[0] += torch.where(counts_B > 0, losses_TB * counts_B, 0.0).sum(1)
        sums_3T[1] += (right_TB * counts_B).sum(1)
        sums_3T[2] += counts_B.sum()
    loss_T, right_T, images_T = p.accelerator.reduce(sums_3T, "sum").tolist()
    if not images_T[0]:
        raise DataError("there is no readable image in the val split; mend its files, or data.root")
    return [
        {"loss": loss / images, "top1": 100 * right / images}
        for loss, right, images in zip(loss_T, right_T, images_T, strict=True)
    ]


def _save(p: TrialGroup) -> str:
    """Save the pass, or warn that it failed; what that means for one that stops here. A collective call.

    Raises RunFailed after MAY_FAIL failures in a row.
    """
    phase.at(f"epoch {p.epoch + 1}", "saving the state")
    failed, unreadable = None, p.train.skipped | (p.val.skipped if p.val is not None else set())
    p.skipped |= set(gather_object(sorted(unreadable)))
    if p.accelerator.is_main_process:
        try:
            _write(p)
        except OSError as error:
            failed = str(error)
    failed = broadcast_object_list([failed])[0]
    p.failures = p.failures + 1 if failed else 0
    if failed is None:
        return "with the state saved; the same command goes on"
    newest = "from the state before" if p.state.is_file() else "from the beginning of these trials"
    p.show(
        f"warning: the state of epoch {p.epoch} could not be saved ({failed}); training goes on, and would be resumed "
        f"{newest}; free space in {p.state.parent}"
    )
    if p.failures == MAY_FAIL:
        stays_full = RunFailed(
            f"{p.state}: could not be saved {MAY_FAIL} times in a row, now because of {failed}; free space there, then "
            f"the same command goes on {newest}"
        )
        stays_full.shared = True
        raise stays_full
    return f"but its state could not be saved ({failed}); the same command goes on {newest}"


def _write(p: TrialGroup) -> None:
    content = {
        "epoch": p.epoch,
        "step": p.step,
        "seconds": p.seconds,
        "skipped": sorted(p.skipped),
        "recipes": [identity_keys(trial.recipe) for trial in p.trials],
        "trials": [
            {
                "trained": collect(trial.reader),
                "optimizer": trial.optimizer.state_dict(),
                "scaler": trial.scaler.state_dict(),
                "progress": asdict(trial.progress),
                "diverged": trial.diverged,
                "best": trial.best,
            }
            for trial in p.trials
        ],
    }
    file = io.BytesIO()
    torch.save(content, file)
    write_atomically(p.state, file.getbuffer())


def _load(p: TrialGroup) -> None:
    try:
        content = torch.load(p.state, map_location="cpu", weights_only=True)
        if content["recipes"] != [identity_keys(trial.recipe) for trial in p.trials]:
            raise ValueError("it is of other trials")
        for trial, saved in zip(p.trials, content["trials"], strict=True):
            restore(trial.reader, saved["trained"], p.state)
            trial.optimizer.load_state_dict(saved["optimizer"])
            trial.scaler.load_state_dict(saved["scaler"])
            trial.progress, trial.diverged, trial.best = Progress(**saved["progress"]), saved["diverged"], saved["best"]
        p.epoch, p.step, p.seconds = content["epoch"], content["step"], content["seconds"]
        p.skipped = set(content["skipped"])
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{p.state}: is not seen here, where process 0 sees it; start again in a minute, or choose a run.dir that "
            "all nodes share"
        ) from error
    except Exception as error:  # torch.load's errors come in many types; all mean that the file is no state of ours
        raise RunFolderError(f"{p.state}: damaged state ({error}); remove it to train its trials anew") from error

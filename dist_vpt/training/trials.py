"""Many trials of a reader in one pass over the frozen stream, each what it would be alone.

B images of a micro-batch, K classes, T trials.

A trial has a recipe, an initialization, an optimizer, clipping, in fp16 a gradient scale, and an end to itself; the
data order, the stream and the loop are shared. The loss is the sum of the trials' losses, so that each one's gradient
is exactly its own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor

from dist_vpt.data.loaders import Batch, EvalBatches
from dist_vpt.distributed.collectives import all_reduce_sum, raise_on_any_rank, stop_all_ranks
from dist_vpt.errors import DataError
from dist_vpt.frozen_stream.observe import StreamOutput, compute_stream
from dist_vpt.runs.adapters import collect
from dist_vpt.training.components import Components
from dist_vpt.training.engine import Training, fit, next_or_error
from dist_vpt.training.metrics import Scores, no_readable_image
from dist_vpt.training.optim import set_lr
from dist_vpt.training.step import (
    clip_gradients,
    fold_in,
    image_losses,
    learning_rate,
    not_finite,
    weigh_global_batch,
)
from dist_vpt.training.trial_state import Trial, write_trials

SAVE_SECONDS = 30.0  # at least so long between states saved at the ends of epochs


@dataclass(kw_only=True)
class TrialGroup(Training):
    """Trials that are trained together, and what they share; its recipe is the first one's.

    All have it in common but for PER_TRIAL_KEYS.
    """

    trials: list[Trial]
    parts: Components
    state: Path  # file of the group's state until it has ended
    show: Callable[[str], None]
    keeps_best: bool = False
    skipped: set[str] = field(default_factory=set)  # files that no process could read
    saved_at: float = field(default_factory=time.monotonic)
    resume_with = "the same command"

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.running]

    @property
    def ended(self) -> bool:
        return not self.running

    @property
    def path(self) -> Path:
        return self.state

    @property
    def state_folder(self) -> Path:
        return self.state.parent

    @property
    def newest_state(self) -> str:
        return "from the state before" if self.state.is_file() else "from the beginning of these trials"

    def start_epoch(self) -> None:
        for trial in self.trials:
            trial.reader.train()

    def take_step(self, fetched: list[Batch] | DataError) -> None:
        step_trials(self, fetched)
        self.progress.step += 1

    def log_step(self) -> None:
        """Report the progress, for ``dist-vpt status``."""
        epochs = self.recipe.train.epochs
        steps = epochs * self.train.steps_per_epoch
        self.accelerator.status.progress = {
            "step": self.step,
            "steps": steps,
            "epoch": self.epoch + 1,
            "epochs": epochs,
            "trials": len(self.trials),
            "seconds": round(self.seconds, 3),
            "seconds_left": round(self.seconds / self.step * (steps - self.step), 3),
            "images_per_s": round(max(trial.progress.images for trial in self.trials) / self.seconds, 2),
        }

    def end_epoch(self) -> None:
        """Loss and top-1 of the epoch, best epochs and early stopping."""
        train, ended, done = self.recipe.train, self.running, self.epoch + 1
        found: list[dict[str, float]] = []
        if self.val is not None and ended and (done == train.epochs or done % train.eval_every == 0):
            self.accelerator.status.set(f"epoch {done}", "scoring val")
            found = _quick_scores(self, ended, self.val)  # before the epoch ends: after a stop it is scored again
        self.progress.epoch, self.progress.step = done, 0
        for trial in ended:
            self.learning_warning(trial.recipe, trial.progress, trial.progress.end_epoch())
        if not found:
            return
        for trial, scores in zip(ended, found, strict=True):
            _check_finite(trial, "loss on val", scores["loss"], self.step)
            if trial.running and trial.progress.scored(scores, train.early_stop) and self.keeps_best:
                trial.best = collect(trial.reader)
        top1 = [trial.progress.last["val"]["top1"] for trial in ended if not trial.diverged]
        shown = f"{min(top1):.2f} to {max(top1):.2f} %" if top1 else "all diverged"
        self.show(f"epoch {done}/{train.epochs}  val top1 of {len(top1)} trials: {shown}")

    def save_is_due(self) -> bool:
        """Process 0 decides for all: other clocks differ. A collective call."""
        due = self.accelerator.is_main_process and time.monotonic() - self.saved_at > SAVE_SECONDS
        self.saved_at = time.monotonic() if due else self.saved_at
        return all_reduce_sum(self.accelerator, due)[0] > 0

    def write_state(self) -> str | None:
        failed = None
        self.skipped |= self.skipped_now()
        if self.accelerator.is_main_process:
            shared = {"epoch": self.epoch, "step": self.progress.step, "seconds": self.seconds}
            try:
                write_trials(self.state, self.trials, {**shared, "skipped": sorted(self.skipped)})
            except OSError as error:
                failed = str(error)
        return broadcast_object_list([failed])[0]

    def warn(self, text: str) -> None:
        self.show(text)


def fit_trials(group: TrialGroup) -> None:
    """Train to the end; each trial is scored on val (if there is one) after the epochs that the recipe says.

    Raises Interrupted, with the state saved, after SIGTERM or SIGUSR1, and RunFailed where the disk stays full.
    """
    group.saved_at = time.monotonic()
    fit(group)
    group.accelerator.status.progress = {}


def step_trials(group: TrialGroup, fetched: list[Batch] | DataError) -> None:
    """One optimizer step of every running trial on one global batch. A collective call."""
    accelerator, running = group.accelerator, group.running
    for trial in running:
        set_lr(
            trial.optimizer,
            learning_rate(trial.recipe.optim, trial.recipe.train, group.step, group.train.steps_per_epoch),
        )
    micro_batches, weight = weigh_global_batch(accelerator, fetched, group.class_weights, group.stop)
    accelerator.status.set(f"step {group.step}", "training", limited=True)
    sums, images = torch.zeros(len(running), 2), 0.0  # loss and correct answers of each trial
    for micro, (batch, weights_B) in enumerate(micro_batches):
        seeds = [fold_in(trial.recipe.seed, group.step, accelerator.process_index, micro) for trial in running]
        logits_TBK = torch.stack(read(running, _observed(group, batch), seeds))
        losses_TB = image_losses(logits_TBK, batch["labels"], group.recipe.train.label_smoothing)
        losses_T = (losses_TB * weights_B).sum(1)
        correct_T = ((logits_TBK.argmax(2) == batch["labels"]) * batch["weight"]).sum(1)
        local = torch.cat([losses_T.detach(), correct_T, batch["weight"].sum()[None]])
        summed = accelerator.reduce(local, "sum").cpu()
        sums += summed[:-1].view(2, -1).T
        images += float(summed[-1])
        for trial, loss in zip(running, summed.tolist(), strict=False):
            _check_finite(trial, "loss", loss, group.step)
        # What is not finite stays in its own trial, whose gradient is not computed.
        alive = [trial.scaler.scale(loss) for trial, loss in zip(running, losses_T, strict=True) if trial.running]
        if alive:
            (torch.stack(alive).sum() / weight).backward()
    _sum_gradients(group, running)
    _update(group)
    for t, trial in enumerate(running):
        trial.optimizer.zero_grad()
        if trial.running:
            trial.progress.count(float(sums[t, 0]) / weight, float(sums[t, 1]), images)


@torch.no_grad()
def score_trials(group: TrialGroup, trials: Sequence[Trial], split: str) -> list[Scores]:
    """Stream a split once through the backbone and score it with all trials. A collective call."""
    group.accelerator.status.set("the end", f"scoring {split}")
    batches = group.parts.evaluation(split, group.accelerator.process_index, group.accelerator.num_processes)
    scores = [Scores(len(group.parts.splits.classes), group.accelerator.device, split) for _ in trials]
    try:
        for batch, logits in _read_split(group, trials, batches):
            for score, logits_BK in zip(scores, logits, strict=True):
                score.update(logits_BK, batch["labels"], batch["weight"], batch["index"])
    finally:
        batches.close()
    group.skipped |= set(gather_object(sorted(batches.skipped)))
    return scores


def read(trials: Sequence[Trial], observed: StreamOutput, seeds: Sequence[int] | None = None) -> list[Tensor]:
    """Logits [B, K] of each trial."""
    readers = [trial.reader for trial in trials]
    return type(readers[0]).read_many(readers, observed, seeds)


def _observed(group: TrialGroup, batch: Batch) -> StreamOutput:
    images, reader = batch["images"], group.trials[0].reader
    return images if isinstance(images, StreamOutput) else compute_stream(reader.backbone, images, reader.spec)


def _read_split(
    group: TrialGroup, trials: Sequence[Trial], batches: EvalBatches
) -> Iterator[tuple[Batch, list[Tensor]]]:
    """Each batch of a split with the logits of every trial. Raises Interrupted after a stop request."""
    for trial in trials:
        trial.reader.eval()
    unread = iter(batches)
    for _ in range(len(batches)):
        fetched = next_or_error(unread)
        raise_on_any_rank(group.accelerator, fetched if isinstance(fetched, DataError) else None, group.stop)
        if group.stop.agreed:
            stop_all_ranks(group.accelerator, f"{group.path}: stopped while scoring a split; the same command resumes")
        batch = send_to_device(fetched, group.accelerator.device, non_blocking=True)
        yield batch, read(trials, _observed(group, batch))


def _check_finite(trial: Trial, name: str, value: float, step: int) -> None:
    trial.diverged = trial.diverged or not_finite(name, value, step)


def _sum_gradients(group: TrialGroup, running: Sequence[Trial]) -> None:
    """Sum the gradients over all processes, in one message."""
    if group.accelerator.num_processes == 1:
        return
    gradients = [p.grad for trial in running if trial.running for p in trial.trained if p.grad is not None]
    if not gradients:
        return
    flat = group.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _update(group: TrialGroup) -> None:
    """Clip and step each trial as it would be alone."""
    trials = group.running
    if not trials:
        return
    for trial in trials:
        trial.scaler.unscale_(trial.optimizer)
    norms = clip_gradients([trial.trained for trial in trials], group.recipe.optim.clip_norm)
    for trial, norm in zip(trials, norms.tolist(), strict=True):
        if not trial.scaler.is_enabled():  # a scaler answers an overflow by a skipped step and a smaller scale
            _check_finite(trial, "gradient norm", norm, group.step)
        if trial.running:
            trial.scaler.step(trial.optimizer)
            trial.scaler.update()


@torch.no_grad()
def _quick_scores(group: TrialGroup, trials: Sequence[Trial], batches: EvalBatches) -> list[dict[str, float]]:
    """Loss and top-1 of each trial; all other scores are for the end."""
    sums_3T = torch.zeros(3, len(trials), device=group.accelerator.device)
    for batch, logits in _read_split(group, trials, batches):
        logits_TBK, counts_B = torch.stack(logits), batch["weight"]
        losses_TB = image_losses(logits_TBK, batch["labels"])
        sums_3T[0] += torch.where(counts_B > 0, losses_TB * counts_B, 0.0).sum(1)
        sums_3T[1] += ((logits_TBK.argmax(2) == batch["labels"]) * counts_B).sum(1)
        sums_3T[2] += counts_B.sum()
    loss_T, correct_T, images_T = group.accelerator.reduce(sums_3T, "sum").tolist()
    if not images_T[0]:
        raise no_readable_image(batches.split)
    return [
        {"loss": loss / images, "top1": 100 * correct / images}
        for loss, correct, images in zip(loss_T, correct_T, images_T, strict=True)
    ]

"""The engine: one training step, fit, evaluate. It knows no method and no task by name.

B images of a micro-batch, K classes.

A global batch of ``train.batch_size`` images is split over the processes x ``train.grad_accum_steps`` micro-batches.
"""

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from dist_vpt.data.augmentation import BatchAugmentation
from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank, stop_all_ranks
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Interrupted, RunFailed, UserError
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress, epoch_facts
from dist_vpt.training.accelerator import steps_are_fused
from dist_vpt.training.agreement import Agreement, next_or_error, reads_late
from dist_vpt.training.averaging import WeightAverage, in_place
from dist_vpt.training.checkpointing import States
from dist_vpt.training.learning import Guessing, warning_of
from dist_vpt.training.logger import RunLogger
from dist_vpt.training.multi_label import AnyScores, scores_of
from dist_vpt.training.optim import set_lr
from dist_vpt.training.step import (
    all_reduced,
    clip,
    fold_in,
    for_each_label,
    image_losses,
    is_deepspeed,
    learning_rate,
    right_answers,
    snapshot,
    update_norms,
    weigh_global_batch,
)
from dist_vpt.training.unread import UnreadStep

MAX_FAILED_SAVES = 3  # in a row: a disk may be full for a while


@dataclass(kw_only=True)
class Training(ABC):
    """A training in progress, as ``fit`` sees it: one run (TrainState), or trials that train together (TrialGroup)."""

    recipe: Recipe
    accelerator: RankAccelerator
    train: TrainBatches
    val: EvalBatches | None
    class_weights: Tensor  # [K]
    guessing: Guessing = field(default_factory=Guessing)  # what guessing would score on the images that are trained on
    stop: StopSignal
    progress: Progress = field(default_factory=Progress)
    agreement: Agreement = field(default_factory=Agreement)  # of its processes
    failed_saves: int = 0  # in a row
    unread: list[Any] = field(default_factory=list)  # steps that have been issued, the oldest first
    resume_with: ClassVar[str]  # what the user does to resume
    at_epoch_end: ClassVar[str] = "while val was scored"
    saved: ClassVar[str] = "with its state saved"

    @property
    def epoch(self) -> int:
        return self.progress.epoch

    @property
    def step(self) -> int:
        """Optimizer steps done since the start of the training."""
        return self.progress.epoch * self.train.steps_per_epoch + self.progress.step

    @property
    def seconds(self) -> float:
        return self.progress.seconds

    @property
    def ended(self) -> bool:
        """Whether it ends before the last epoch."""
        return self.progress.ended

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder or file that messages name."""

    @property
    @abstractmethod
    def state_folder(self) -> Path:
        """Where states are saved."""

    @property
    @abstractmethod
    def newest_state(self) -> str:
        """Where a resumed training would start."""

    @abstractmethod
    def start_epoch(self) -> None: ...
    @abstractmethod
    def take_step(self, fetched: list[Batch] | UserError) -> None: ...
    @abstractmethod
    def count_step(self, unread: Any) -> None: ...  # read, count and report it
    @abstractmethod
    def end_epoch(self) -> None: ...  # raises Interrupted, with the epoch not ended, for a stop while val is scored
    @abstractmethod
    def save_is_due(self) -> bool: ...  # at the end of an epoch
    @abstractmethod
    def write_state(self) -> str | None: ...  # why it failed, if it did; a collective call
    @abstractmethod
    def warn(self, text: str) -> None: ...

    def read_steps(self, but: int = 0) -> None:
        """Count and report steps that were issued, but for the last ``but``; raises Diverged, and as ``agreement``."""
        while len(self.unread) > but:
            self.count_step(self.unread.pop(0))

    def skipped_now(self) -> set[str]:
        """Files that any process could not read since it was started. A collective call."""
        found = self.train.skipped | (self.val.skipped if self.val is not None else set())
        return set(gather_object(sorted(found)))

    def learning_warning(self, recipe: Recipe, progress: Progress, scores: dict[str, float]) -> str:
        """A warning that the epoch that just ended shows no learning, kept in ``progress``; or ""."""
        about = recipe.optim, recipe.train, progress.epoch, scores, self.train.images, self.guessing
        found = "" if progress.warnings else warning_of(*about)
        progress.warnings += [found] if found else []
        return found

    def close(self) -> None:
        """Stop the workers that load images."""
        self.train.close()
        if self.val is not None:
            self.val.close()


@dataclass(kw_only=True)
class TrainState(Training):
    """Everything one run works with."""

    method: Method  # owns what is trained
    model: nn.Module  # the method as DDP or DeepSpeed wraps it
    optimizer: Any
    folder: RunFolder
    states: States
    monitor: RunLogger
    facts: dict[str, Any]  # written into the head of adapter files
    parameters: dict[str, int]  # trained, total
    augmentation: BatchAugmentation | None = None  # of batches on the device
    average: WeightAverage | None = None  # of the trained tensors, where one is scored and saved in their place
    resume_with = "run.resume=auto"

    def __post_init__(self) -> None:
        # 1 from the first loss or norm on that is not finite: all steps that are issued until it is read are skipped.
        self.spoiled = torch.zeros((), device=self.accelerator.device)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def state_folder(self) -> Path:
        return self.folder.state

    @property
    def newest_state(self) -> str:
        return self.states.newest

    def start_epoch(self) -> None:
        self.model.train()

    def take_step(self, fetched: list[Batch] | UserError) -> None:
        """Issue one optimizer step, with norms where the step will be logged."""
        self.unread.append(train_step(self, fetched, norms=(self.step + 1) % self.recipe.run.log_every == 0))
        self.progress.step += 1

    def count_step(self, unread: UnreadStep) -> None:
        """Read a step, count it and report it. Raises Diverged."""
        with self.accelerator.status.in_collective() if unread.late else nullcontext():
            step, number = unread.read(), unread.step + 1
        if unread.late:
            self.agreement.reached(self.accelerator, self.stop, *unread.flags)
        self.progress.count(step.loss, step.correct, step.images)
        self.monitor.step(number, step, self.progress, logged=number % self.recipe.run.log_every == 0)

    def end_epoch(self) -> None:
        """Metrics, best epoch and early stopping at the end of an epoch."""
        recipe, progress, epoch = self.recipe, self.progress, self.progress.epoch + 1  # counted from 1
        is_scored, found = epoch == recipe.train.epochs or epoch % recipe.train.eval_every == 0, None
        if self.val is not None and is_scored:
            with in_place(self.average):
                found = evaluate(self.accelerator, self.model, self.val, len(self.class_weights), stop=self.stop)
            scores = found.compute()
        learned = progress.end_epoch(recipe.data.step_score)
        self.monitor.scores(epoch, self.step, "train", learned)
        if warning := self.learning_warning(recipe, progress, learned):
            self.warn(f"warning: {warning}")
        if found is not None:
            self.monitor.scores(epoch, self.step, "val", scores)
            if progress.scored(scores, recipe.train.early_stop, found.thresholds):
                with in_place(self.average):
                    tensors = collect(self.method)
                if self.accelerator.is_main_process:
                    self.states.keep_best(tensors, self.facts | epoch_facts(progress.best))

    def save_is_due(self) -> bool:
        every = self.recipe.run.save_every
        return not every or self.step % every == 0

    def write_state(self) -> str | None:
        self.progress.skipped = sorted(set(self.progress.skipped) | self.skipped_now())
        flush = self.monitor.flush
        return self.states.save(self.method, self.optimizer, self.progress, self.step, flush, self.average)

    def warn(self, text: str) -> None:
        self.monitor.line(text)

    def close(self) -> None:
        """Stop the progress bar and the trackers, too."""
        super().close()
        self.monitor.close()


def train_step(t: TrainState, fetched: list[Batch] | UserError, *, norms: bool) -> UnreadStep:
    """Issue one optimizer step on this process's micro-batches of one global batch. A collective call."""
    accelerator, train = t.accelerator, t.recipe.train
    lr = learning_rate(t.recipe.optim, train, t.step, t.train.steps_per_epoch)
    issued, before = UnreadStep(t.path, t.epoch, t.step, lr, _checked(t)), None
    set_lr(t.optimizer, lr)
    augment = None if t.augmentation is None else partial(t.augmentation, epoch=t.epoch, step=t.progress.step)
    global_batch = accelerator, fetched, t.class_weights, t.stop
    micro_batches, weight = weigh_global_batch(*global_batch, augment=augment, agreement=t.agreement)
    issued.numbers |= t.agreement.numbers
    accelerator.status.set(f"step {t.step}", "training", limited=True)
    scale = accelerator.num_processes * train.grad_accum_steps / weight
    sums = torch.zeros(3, device=accelerator.device)  # of the micro-batches: loss, correct answers, images
    for micro, (batch, weights_B) in enumerate(micro_batches):
        torch.manual_seed(fold_in(t.recipe.seed, t.step, accelerator.process_index, micro))  # of dropout
        with accelerator.accumulate(t.model):
            logits_BK, labels = for_each_label(t.model(batch["images"]), batch["labels"]), batch["labels"]
            loss = (image_losses(logits_BK, labels, train.label_smoothing, t.class_weights) * weights_B).sum()
            correct = (right_answers(logits_BK, labels) * batch["weight"]).sum()
            images = batch["weight"].sum().round()  # to which the shares of mixed ones add up
            sums += torch.stack([loss.detach(), correct, images])
            last = accelerator.sync_gradients
            if last:
                before = snapshot(_trained(t)) if norms else None
                issued.numbers |= all_reduced(accelerator, sums) | {"weight": weight}
            if last and is_deepspeed(accelerator):  # its backward also steps
                issued.raise_if_diverged()
            accelerator.backward(loss * scale + t.method.penalty())
            if last:
                issued.numbers |= clip(accelerator, _trained(t), t.recipe.optim.clip_norm)
                _guard(t, issued)
            t.optimizer.step()
            t.optimizer.zero_grad()
    if before is not None:
        issued.numbers |= update_norms(accelerator, before, _trained(t))
    if t.average is not None and not t.optimizer.step_was_skipped:
        t.average.update(t.step)
    return issued.send()


def fit(t: Training) -> None:
    """Train to the end, evaluating and saving as the recipe says.

    Raises Diverged where a run's loss is not finite, RunFailed where the disk stays full, and Interrupted, with the
    state saved, after SIGTERM or SIGUSR1.
    """
    started, every = time.monotonic() - t.seconds, t.recipe.run.save_every
    while not _finished(t):
        t.start_epoch()
        # Where errors are read late, a step that lacks images would have been issued, and would spoil the state.
        t.stop.ends_waiting = not reads_late(t.accelerator)
        batches = t.train.epoch(t.epoch, t.progress.step)
        while t.progress.step < t.train.steps_per_epoch and not t.ended:
            t.accelerator.status.set(f"step {t.step}", "reading images")
            try:
                t.take_step(t.agreement.error or next_or_error(batches))
            except Interrupted:  # of any process that waited for images, raised on all, and no step was taken
                t.stop.agreed = True
                _stop_if_agreed(t)
            t.progress.seconds = time.monotonic() - started
            t.read_steps(but=1)  # while the device computes the one that was just issued
            _stop_if_agreed(t)
            if every and t.step % every == 0 and t.progress.step < t.train.steps_per_epoch:
                save(t)
        t.read_steps()
        _stop_if_agreed(t)
        t.stop.ends_waiting = True
        try:
            t.end_epoch()
        except (DataError, Interrupted) as error:  # saved as of the epoch's last step: a resumed run scores val
            t.progress.seconds = time.monotonic() - started
            ended = f"stopped at step {t.step}, {t.at_epoch_end}, {save(t)}"
            if isinstance(error, DataError):  # of any process, raised on all
                error.args = (f"{error}\n{t.path}: {ended}",)
                raise
            stop_all_ranks(t.accelerator, f"{t.path}: {ended}")
        t.progress.seconds = time.monotonic() - started
        if _finished(t) or t.save_is_due():
            save(t)


def _stop_if_agreed(t: Training) -> None:
    """Save the state and raise Interrupted, once all processes have agreed on a stop."""
    if t.stop.agreed:
        stop_all_ranks(t.accelerator, f"{t.path}: stopped at step {t.step} {save(t)}")


def save(t: Training) -> str:
    """Save the state, or warn that it failed; returns what that means for a training that stops. A collective call.

    Raises what ``read_steps`` does, and RunFailed after MAX_FAILED_SAVES failures in a row.
    """
    t.read_steps()  # nothing that was computed from a loss that is not finite is saved
    t.accelerator.status.set(f"step {t.step}", "saving the state")
    failed = t.write_state()
    t.failed_saves = t.failed_saves + 1 if failed else 0
    if failed is None:
        return f"{t.saved}; {t.resume_with} resumes it"
    t.warn(
        f"warning: the state of step {t.step} could not be saved ({failed}); training continues, and would resume "
        f"{t.newest_state}; free space in {t.state_folder}"
    )
    if t.failed_saves == MAX_FAILED_SAVES:
        error = RunFailed(
            f"{t.path}: {MAX_FAILED_SAVES} states in a row could not be saved, that of step {t.step} because of "
            f"{failed}; free space there, then {t.resume_with} resumes {t.newest_state}"
        )
        error.shared = True
        raise error
    return f"but its state could not be saved ({failed}); {t.resume_with} resumes {t.newest_state}"


@torch.no_grad()
def evaluate(
    accelerator: RankAccelerator,
    model: nn.Module,
    batches: EvalBatches,
    classes: int,
    stop: StopSignal | None = None,
    **options: Any,
) -> AnyScores:
    """Score a split, every example once over all processes; ``options``: as of ``scores_of``. A collective call.

    Raises a process's DataError on all of them, and Interrupted after a stop request to ``stop``.
    """
    model.eval()
    scores = scores_of(batches, classes, accelerator.device, **options)
    unread = iter(batches)
    for number in range(len(batches)):
        accelerator.status.set(f"batch {number} of a split to score", "reading images")
        fetched = next_or_error(unread)
        raise_on_any_rank(accelerator, fetched if isinstance(fetched, UserError) else None, stop)
        if stop is not None and stop.agreed:
            stop_all_ranks(accelerator, "stopped while scoring a split; run.resume=auto resumes from the newest state")
        batch = send_to_device(fetched, accelerator.device, non_blocking=True)
        scores.update(model(batch["images"]), batch["labels"], batch["weight"], batch["index"])
    return scores


def _finished(t: Training) -> bool:
    return t.ended or t.epoch >= t.recipe.train.epochs


def _trained(t: TrainState) -> list[nn.Parameter]:
    return [parameter for _, parameter in t.method.trainable()]


def _checked(t: TrainState) -> tuple[str, ...]:
    """What must be finite; a gradient scale answers an overflow by a skipped step and a smaller scale."""
    return ("loss", "gradient norm") if t.accelerator.scaler is None else ("loss",)


def _guard(t: TrainState, issued: UnreadStep) -> None:
    """Let no loss or gradient norm that is not finite change what is trained or what the optimizer remembers.

    A fused step, and all after it, are skipped on the device, and Diverged is raised when the step is read. Elsewhere
    the numbers are read here: without a fused kernel only the host can skip a step. Under DeepSpeed it must even hold
    back the backward, which steps by itself.
    """
    if not steps_are_fused(t.accelerator, t.recipe.optim):
        issued.raise_if_diverged()
        return
    t.spoiled = torch.where(issued.finite(), t.spoiled, 1.0)
    t.optimizer.optimizer.found_inf = t.spoiled

"""The engine: one training step, fit, evaluate. It knows no method and no task by name.

B images of a micro-batch, K classes.

A global batch of ``train.batch_size`` images is split over the processes x ``train.grad_accum_steps`` micro-batches.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor, nn

from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank, stop_all_ranks
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Diverged, Interrupted, RunFailed
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.training.checkpointing import States
from dist_vpt.training.learning import warning_of
from dist_vpt.training.logger import RunLogger
from dist_vpt.training.metrics import Scores
from dist_vpt.training.optim import set_lr
from dist_vpt.training.step import (
    DIVERGED_FIX,
    Step,
    clip_gradients,
    fold_in,
    image_losses,
    learning_rate,
    not_finite,
    snapshot,
    squared_norms,
    weigh_global_batch,
)

MAX_FAILED_SAVES = 3  # in a row: a disk may be full for a while


@dataclass(kw_only=True)
class Training(ABC):
    """A training in progress, as ``fit`` sees it: one run (TrainState), or trials that train together (TrialGroup)."""

    recipe: Recipe
    accelerator: RankAccelerator
    train: TrainBatches
    val: EvalBatches | None
    class_weights: Tensor  # [K]
    majority: float = 0.0  # share of the largest class among the images that are trained on
    stop: StopSignal
    progress: Progress = field(default_factory=Progress)
    failed_saves: int = 0  # in a row
    resume_with: ClassVar[str]  # what the user does to resume

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
    def take_step(self, fetched: list[Batch] | DataError) -> None: ...
    @abstractmethod
    def log_step(self) -> None: ...
    @abstractmethod
    def end_epoch(self) -> None: ...  # raises Interrupted, with the epoch not ended, for a stop while val is scored
    @abstractmethod
    def save_is_due(self) -> bool: ...  # at the end of an epoch
    @abstractmethod
    def write_state(self) -> str | None: ...  # why it failed, if it did; a collective call
    @abstractmethod
    def warn(self, text: str) -> None: ...

    def skipped_now(self) -> set[str]:
        """Files that any process could not read since it was started. A collective call."""
        found = self.train.skipped | (self.val.skipped if self.val is not None else set())
        return set(gather_object(sorted(found)))

    def learning_warning(self, recipe: Recipe, progress: Progress, scores: dict[str, float]) -> str:
        """A warning that the epoch that just ended shows no learning, kept in ``progress``; or ""."""
        classes, images = len(self.class_weights), self.train.images
        found = warning_of(recipe.optim, recipe.train, progress.epoch, scores, classes, images, self.majority)
        if found and not progress.warnings:
            progress.warnings.append(found)
            return found
        return ""

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
    latest: Step | None = None  # what the latest step reported
    resume_with = "run.resume=auto"

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

    def take_step(self, fetched: list[Batch] | DataError) -> None:
        """One optimizer step, with norms where the step will be logged."""
        self.latest = train_step(self, fetched, norms=(self.step + 1) % self.recipe.run.log_every == 0)
        self.progress.count(self.latest.loss, self.latest.correct, self.latest.images)

    def log_step(self) -> None:
        assert self.latest is not None
        logged = self.step % self.recipe.run.log_every == 0
        self.monitor.step(self.step, self.latest, self.progress, logged=logged)

    def end_epoch(self) -> None:
        """Metrics, best epoch and early stopping at the end of an epoch."""
        recipe, progress, epoch = self.recipe, self.progress, self.progress.epoch + 1  # counted from 1
        is_scored, scores = epoch == recipe.train.epochs or epoch % recipe.train.eval_every == 0, None
        if self.val is not None and is_scored:
            scores = evaluate(self.accelerator, self.model, self.val, len(self.class_weights), stop=self.stop).compute()
        learned = progress.end_epoch()
        self.monitor.scores(epoch, self.step, "train", learned)
        if found := self.learning_warning(recipe, progress, learned):
            self.warn(f"warning: {found}")
        if scores is not None:
            self.monitor.scores(epoch, self.step, "val", scores)
            if progress.scored(scores, recipe.train.early_stop):
                tensors = collect(self.method)
                if self.accelerator.is_main_process:
                    self.states.keep_best(tensors, self.facts | {"epoch": epoch})

    def save_is_due(self) -> bool:
        every = self.recipe.run.save_every
        return not every or self.step % every == 0

    def write_state(self) -> str | None:
        self.progress.skipped = sorted(set(self.progress.skipped) | self.skipped_now())
        return self.states.save(self.method, self.optimizer, self.progress, self.step, self.monitor.flush)

    def warn(self, text: str) -> None:
        self.monitor.line(text)

    def close(self) -> None:
        """Stop the progress bar and the trackers, too."""
        super().close()
        self.monitor.close()


def train_step(t: TrainState, fetched: list[Batch] | DataError, *, norms: bool) -> Step:
    """One optimizer step on this process's micro-batches of one global batch. A collective call."""
    accelerator, train = t.accelerator, t.recipe.train
    lr = learning_rate(t.recipe.optim, train, t.step, t.train.steps_per_epoch)
    set_lr(t.optimizer, lr)
    micro_batches, weight = weigh_global_batch(accelerator, fetched, t.class_weights, t.stop)
    accelerator.status.set(f"step {t.step}", "training", limited=True)
    scale = accelerator.num_processes * train.grad_accum_steps / weight
    sums = torch.zeros(3, device=accelerator.device)  # of the micro-batches: loss, correct answers, images
    gradient_norm, before = None, None
    for micro, (batch, weights_B) in enumerate(micro_batches):
        torch.manual_seed(fold_in(t.recipe.seed, t.step, accelerator.process_index, micro))  # of dropout
        with accelerator.accumulate(t.model):
            logits_BK, labels_B = t.model(batch["images"]), batch["labels"]
            loss = (image_losses(logits_BK, labels_B, train.label_smoothing) * weights_B).sum()
            correct = ((logits_BK.argmax(1) == labels_B) * batch["weight"]).sum()
            sums += torch.stack([loss.detach(), correct, batch["weight"].sum()])
            if norms and accelerator.sync_gradients:
                before = snapshot(_trained(t))
            if accelerator.sync_gradients and _is_deepspeed(t):  # its backward also steps
                numbers = _read(t, sums, weight)
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients and _is_deepspeed(t):
                gradient_norm = _deepspeed_norm(t)
            elif accelerator.sync_gradients:
                accelerator.unscale_gradients()
                numbers = _read(t, sums, weight, clip_gradients([_trained(t)], t.recipe.optim.clip_norm))
                gradient_norm = numbers[-1]
            t.optimizer.step()
            t.optimizer.zero_grad()
    parameter_norm, update_norm = _norms(t, before) if before is not None else (None, None)
    loss_sum, correct_sum, images, weight_read = numbers[:4]
    return Step(loss_sum / weight_read, correct_sum, images, lr, gradient_norm, parameter_norm, update_norm)


def fit(t: Training) -> None:
    """Train to the end, evaluating and saving as the recipe says.

    Raises Diverged where a run's loss is not finite, RunFailed where the disk stays full, and Interrupted, with the
    state saved, after SIGTERM or SIGUSR1.
    """
    started, every = time.monotonic() - t.seconds, t.recipe.run.save_every
    while not _finished(t):
        t.start_epoch()
        batches = t.train.epoch(t.epoch, t.progress.step)
        while t.progress.step < t.train.steps_per_epoch and not t.ended:
            t.accelerator.status.set(f"step {t.step}", "reading images")
            t.take_step(next_or_error(batches))
            t.progress.seconds = time.monotonic() - started
            t.log_step()
            if t.stop.agreed:
                stop_all_ranks(t.accelerator, f"{t.path}: stopped at step {t.step} {save(t)}")
            if every and t.step % every == 0 and t.progress.step < t.train.steps_per_epoch:
                save(t)
        try:
            t.end_epoch()
        except (DataError, Interrupted) as error:  # saved as of the epoch's last step: a resumed run scores val
            t.progress.seconds = time.monotonic() - started
            ended = f"stopped at step {t.step}, while val was scored, {save(t)}"
            if isinstance(error, DataError):  # of any process, raised on all
                error.args = (f"{error}\n{t.path}: {ended}",)
                raise
            stop_all_ranks(t.accelerator, f"{t.path}: {ended}")
        t.progress.seconds = time.monotonic() - started
        if _finished(t) or t.save_is_due():
            save(t)


def save(t: Training) -> str:
    """Save the state, or warn that it failed; returns what that means for a training that stops. A collective call.

    Raises RunFailed after MAX_FAILED_SAVES failures in a row.
    """
    t.accelerator.status.set(f"step {t.step}", "saving the state")
    failed = t.write_state()
    t.failed_saves = t.failed_saves + 1 if failed else 0
    if failed is None:
        return f"with its state saved; {t.resume_with} resumes it"
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
def evaluate(  # noqa: PLR0917 (a split, how to score it, when to stop)
    accelerator: RankAccelerator,
    model: nn.Module,
    batches: EvalBatches,
    classes: int,
    confusion: bool = False,
    stop: StopSignal | None = None,
) -> Scores:
    """Score a split, every example once over all processes. A collective call.

    Raises a process's DataError on all of them, and Interrupted after a stop request to ``stop``.
    """
    model.eval()
    scores = Scores(classes, accelerator.device, batches.split, confusion=confusion)
    unread = iter(batches)
    for number in range(len(batches)):
        accelerator.status.set(f"batch {number} of a split to score", "reading images")
        fetched = next_or_error(unread)
        raise_on_any_rank(accelerator, fetched if isinstance(fetched, DataError) else None, stop)
        if stop is not None and stop.agreed:
            stop_all_ranks(accelerator, "stopped while scoring a split; run.resume=auto resumes from the newest state")
        batch = send_to_device(fetched, accelerator.device, non_blocking=True)
        scores.update(model(batch["images"]), batch["labels"], batch["weight"], batch["index"])
    return scores


def next_or_error(batches: Iterator[Any]) -> Any:
    """The next batch, or as a value the error that all processes are to raise."""
    try:
        return next(batches)
    except DataError as error:
        return error


def _finished(t: Training) -> bool:
    return t.ended or t.epoch >= t.recipe.train.epochs


def _trained(t: TrainState) -> list[nn.Parameter]:
    return [parameter for _, parameter in t.method.trainable()]


def _check_finite(name: str, value: float, t: TrainState) -> None:
    if found := not_finite(name, value, t.step):
        error = Diverged(f"{t.path}: {found} (epoch {t.epoch}), before the optimizer step; {DIVERGED_FIX}")
        error.shared = True  # of the global batch, so that all processes see it
        raise error


def _read(t: TrainState, sums: Tensor, weight: Tensor, *norm: Tensor) -> list[float]:
    """The step's numbers, read from the device at once before the optimizer steps: sums over all processes (loss,
    correct answers, images), weight, and gradient norm where it is given. A collective call.

    Raises Diverged where one is not finite.
    """
    with t.accelerator.status.in_collective():
        sums = t.accelerator.reduce(sums, "sum")
    numbers = torch.cat([sums, weight[None], *norm]).tolist()
    _check_finite("loss", numbers[0], t)
    if norm and t.accelerator.scaler is None:  # a scaler answers an overflow by a skipped step and a smaller scale
        _check_finite("gradient norm", numbers[-1], t)
    return numbers


def _is_deepspeed(t: TrainState) -> bool:
    return t.accelerator.distributed_type == DistributedType.DEEPSPEED


def _deepspeed_norm(t: TrainState) -> float | None:
    """The gradient norm, which DeepSpeed has clipped by its own configuration; None where it does not report it."""
    norm = t.accelerator.clip_grad_norm_(_trained(t), t.recipe.optim.clip_norm)
    if norm is None:
        return None
    if t.accelerator.scaler is None:
        _check_finite("gradient norm", float(norm), t)
    return float(norm)


def _norms(t: TrainState, before: list[Tensor]) -> tuple[float, float]:
    """L2 norms of the trained tensors and of their last update. A collective call under ZeRO-3."""
    squares = squared_norms(before, snapshot(_trained(t))).to(t.accelerator.device)
    if any(hasattr(parameter, "ds_tensor") for parameter in _trained(t)):
        squares = t.accelerator.reduce(squares, "sum")
    parameter_norm, update_norm = squares.sqrt().tolist()
    return parameter_norm, update_norm

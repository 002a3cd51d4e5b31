"""The engine: one training step, fit, evaluate. It knows no method and no task by name.

B images of a micro-batch, S image side, K classes, W processes.

A global batch of ``train.batch_size`` images is split over W processes x ``train.grad_accum_steps`` micro-batches.
Losses are summed and divided by the weight of the global batch, so that a step is the same whatever W and the
micro-batches.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.distributed.collectives import all_reduce_sum, raise_on_all_ranks, raise_on_any_rank, stop_all_ranks
from dist_vpt.distributed.rank_status import phase
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import DataError, Diverged, Interrupted, RunFailed
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.training.checkpointing import States
from dist_vpt.training.logger import RunLogger
from dist_vpt.training.metrics import Scores
from dist_vpt.training.optim import multiplier, set_lr

MAY_FAIL = 3  # saved states in a row: a disk may be full for a while


@dataclass
class TrainState:
    """Everything one run works with; made by train.py."""

    recipe: Recipe
    accelerator: Accelerator
    method: Method  # owns what is trained
    model: nn.Module  # the method as DDP or DeepSpeed wraps it
    optimizer: Any
    train: TrainBatches
    val: EvalBatches | None
    class_weights: Tensor  # [K]
    folder: RunFolder
    states: States
    monitor: RunLogger
    facts: dict[str, Any]  # written into the head of adapter files
    progress: Progress
    parameters: dict[str, int]  # trained, total
    stop: StopSignal

    @property
    def step(self) -> int:
        """Optimiser steps done since the start of the run."""
        return self.progress.epoch * self.train.steps_per_epoch + self.progress.step

    def skipped(self) -> set[str]:
        """Files that any process could not read so far. A collective call."""
        found = self.train.skipped | (self.val.skipped if self.val else set())
        return set(gather_object(sorted(found)))

    def close(self) -> None:
        """End the workers that load images, the bar and the trackers."""
        self.train.close()
        if self.val is not None:
            self.val.close()
        self.monitor.close()


@dataclass(frozen=True)
class Step:
    """What one optimiser step tells."""

    loss: float  # mean over the global batch, weighted as the recipe says
    correct: float  # images
    images: float
    lr: float
    gradient_norm: float | None  # before clipping; None where DeepSpeed does not tell
    parameter_norm: float | None  # of the trained tensors; like update_norm known at logged steps alone
    update_norm: float | None


def train_step(t: TrainState, fetched: list[Batch] | DataError, *, norms: bool) -> Step:
    """One optimiser step on this process's micro-batches of one global batch. A collective call."""
    accelerator, recipe = t.accelerator, t.recipe
    lr = recipe.optim.peak_lr(recipe.train.batch_size)
    lr *= multiplier(recipe.optim, t.step, t.train.steps_per_epoch, recipe.train.epochs)
    set_lr(t.optimizer, lr)
    batches = [] if isinstance(fetched, DataError) else [_to(batch, accelerator.device) for batch in fetched]
    weights = [t.class_weights[batch["labels"]] * batch["weight"] for batch in batches]
    weight = global_weight(accelerator, t.stop, weights, fetched)
    phase.at(f"step {t.step}", "training", limited=True)
    scale = accelerator.num_processes * recipe.train.grad_accum_steps / weight
    sums, gradient_norm, before = [0.0, 0.0, 0.0], None, None
    for micro, (batch, weights_B) in enumerate(zip(batches, weights, strict=True)):
        torch.manual_seed(fold_in(recipe.seed, t.step, accelerator.process_index, micro))  # dropout: no state to save
        with accelerator.accumulate(t.model):
            logits_BK, labels_B = t.model(batch["images"]), batch["labels"]
            losses_B = F.cross_entropy(
                logits_BK, labels_B, reduction="none", label_smoothing=recipe.train.label_smoothing
            )
            loss = (losses_B * weights_B).sum()
            right = ((logits_BK.argmax(1) == labels_B) * batch["weight"]).sum()
            seen = all_reduce_sum(accelerator, loss.detach(), right, batch["weight"].sum())
            _check_finite("loss", seen[0], t)  # before backward: DeepSpeed's backward also steps
            sums = [a + b for a, b in zip(sums, seen, strict=True)]
            if norms and accelerator.sync_gradients:
                before = _trained_shards(t.method)
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients:
                gradient_norm = _clip(t)
            t.optimizer.step()
            t.optimizer.zero_grad()
    parameter_norm, update_norm = _norms(t, before) if before is not None else (None, None)
    return Step(sums[0] / weight, sums[1], sums[2], lr, gradient_norm, parameter_norm, update_norm)


def fit(t: TrainState) -> None:
    """Train from ``t.progress`` to the end, evaluating and saving as the recipe says.

    Raises Diverged for a loss that is not finite and Interrupted, with the state saved, after SIGTERM or SIGUSR1.
    """
    recipe, progress, began = t.recipe, t.progress, time.monotonic() - t.progress.seconds
    while progress.epoch < recipe.train.epochs and not progress.ended:
        t.model.train()
        batches = t.train.epoch(progress.epoch, progress.step)
        while progress.step < t.train.steps_per_epoch:
            phase.at(f"step {t.step}", "reading images")
            logged = (t.step + 1) % recipe.run.log_every == 0
            step = train_step(t, next_or_error(batches), norms=logged)
            progress.count(step.loss, step.correct, step.images)
            progress.seconds = time.monotonic() - began
            t.monitor.step(t.step, step, progress, logged=logged)
            within = progress.step < t.train.steps_per_epoch
            if t.stop.agreed:
                stop_all_ranks(t.accelerator, f"{t.folder.path}: stopped at step {t.step} {_save(t)}")
            if within and recipe.run.save_every and t.step % recipe.run.save_every == 0:
                _save(t)
        try:
            _end_epoch(t)
        except Interrupted:  # as of the epoch's last step: a resumed run scores val
            progress.seconds = time.monotonic() - began
            stop_all_ranks(
                t.accelerator, f"{t.folder.path}: stopped at step {t.step}, while val was scored, {_save(t)}"
            )
        progress.seconds = time.monotonic() - began
        over = progress.ended or progress.epoch == recipe.train.epochs
        if over or not recipe.run.save_every or t.step % recipe.run.save_every == 0:
            _save(t)


@torch.no_grad()
def evaluate(  # noqa: PLR0917 (a split, how to score it, when to stop)
    accelerator: Accelerator,
    model: nn.Module,
    batches: EvalBatches,
    classes: int,
    confusion: bool = False,
    stop: StopSignal | None = None,
) -> Scores:
    """Score a split, every example once over all processes. A collective call.

    Raises a process's DataError on all of them, and Interrupted where ``stop`` was asked.
    """
    model.eval()
    scores = Scores(classes, accelerator.device, confusion=confusion)
    unread = iter(batches)
    for number in range(len(batches)):
        phase.at(f"batch {number} of a split to score", "reading images")
        fetched = next_or_error(unread)
        error = fetched if isinstance(fetched, DataError) else None
        raise_on_any_rank(accelerator, error, stop)
        if stop is not None and stop.agreed:
            told = "stopped while scoring a split; run.resume=auto goes on from the newest saved state"
            stop_all_ranks(accelerator, told)
        assert not isinstance(fetched, DataError)
        batch = _to(fetched, accelerator.device)
        scores.update(model(batch["images"]), batch["labels"], batch["weight"], batch["index"])
    return scores


def next_or_error(batches: Iterator[Any]) -> Any:
    """The next batch, or as a value the error that all processes are to be told of."""
    try:
        return next(batches)
    except DataError as error:
        return error


def global_weight(
    accelerator: Accelerator, stop: StopSignal, weights: list[Tensor], fetched: list[Batch] | DataError
) -> float:
    """The loss weight of the global batch; here all processes also learn of errors and of a stop that was asked."""
    local = torch.stack([w.sum() for w in weights]).sum() if weights else 0.0
    weight, failed, stopped = all_reduce_sum(accelerator, local, isinstance(fetched, DataError), stop.asked)
    if failed:
        raise_on_all_ranks(accelerator, fetched if isinstance(fetched, DataError) else None)
    stop.agreed = stopped > 0
    return max(weight, 1e-12)  # a batch of skipped images alone has none, and its loss is 0


def _to(batch: Batch, device: torch.device) -> Batch:
    return send_to_device(batch, device, non_blocking=True)


def fold_in(*numbers: int) -> int:
    """A seed from several numbers (64-bit FNV-1a): neighbours in any of them give unrelated seeds."""
    folded = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            folded = ((folded ^ byte) * 0x100000001B3) % 2**64
    return folded % 2**63


def _check_finite(name: str, value: float, t: TrainState) -> None:
    if not math.isfinite(value):
        failed = Diverged(
            f"{t.folder.path}: the {name} is {value} at step {t.step} (epoch {t.progress.epoch}), before the optimiser "
            "step; lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_norm"
        )
        failed.shared = True  # of the global batch, so that all processes see it
        raise failed


def _clip(t: TrainState) -> float | None:
    """Clip and return the gradient norm; DeepSpeed has clipped by its own configuration."""
    parameters = [p for _, p in t.method.trainable()]
    norm = t.accelerator.clip_grad_norm_(parameters, t.recipe.optim.clip_norm or math.inf)
    if norm is None:
        return None
    if t.accelerator.scaler is None:  # with a scaler an overflow is met by a skipped step and a smaller scale
        _check_finite("gradient norm", float(norm), t)
    return float(norm)


def _trained_shards(method: Method) -> list[Tensor]:
    """Copies of what this process holds of the trained tensors (under ZeRO-3, its shards)."""
    return [getattr(p, "ds_tensor", p).detach().float().clone() for _, p in method.trainable()]


def _norms(t: TrainState, before: list[Tensor]) -> tuple[float, float]:
    """L2 norms of the trained tensors and of their last update. A collective call under ZeRO-3."""
    after = _trained_shards(t.method)
    squares = torch.stack(
        [
            torch.stack([(a**2).sum() for a in after]).sum(),
            torch.stack([((a - b) ** 2).sum() for a, b in zip(after, before, strict=True)]).sum(),
        ]
    ).to(t.accelerator.device)
    if any(hasattr(p, "ds_tensor") for _, p in t.method.trainable()):
        squares = t.accelerator.reduce(squares, "sum")
    parameter, update = squares.sqrt().tolist()
    return parameter, update


def _end_epoch(t: TrainState) -> None:
    """Metrics, best epoch and early stopping at the end of an epoch.

    Raises Interrupted, with the epoch not ended, where a stop was asked while val is scored.
    """
    recipe, progress, epoch = t.recipe, t.progress, t.progress.epoch + 1  # as people count
    scored, scores = epoch == recipe.train.epochs or epoch % recipe.train.eval_every == 0, None
    if t.val is not None and scored:
        scores = evaluate(t.accelerator, t.model, t.val, len(t.class_weights), stop=t.stop).compute()
    t.monitor.scores(epoch, t.step, "train", progress.end_epoch())
    if scores is not None:
        t.monitor.scores(epoch, t.step, "val", scores)
        if progress.scored(scores, recipe.train.early_stop):
            tensors = collect(t.method)
            if t.accelerator.is_main_process:
                t.states.keep_best(tensors, t.facts | {"epoch": epoch})


def _save(t: TrainState) -> str:
    """Save the state, or warn that it failed; what that means for a run that stops here. A collective call.

    Raises RunFailed after MAY_FAIL failures in a row.
    """
    phase.at(f"step {t.step}", "saving the state")
    t.progress.skipped = sorted(set(t.progress.skipped) | t.skipped())
    failed = t.states.save(t.method, t.optimizer, t.progress, t.step, t.monitor.flush)
    if failed is None:
        return "with its state saved; run.resume=auto goes on"
    t.monitor.line(
        f"warning: the state of step {t.step} could not be saved ({failed}); training goes on, and would be resumed "
        f"{t.states.newest}; free space in {t.folder.state}"
    )
    if t.states.failures == MAY_FAIL:
        stays_full = RunFailed(
            f"{t.folder.path}: {MAY_FAIL} states in a row could not be saved, that of step {t.step} because of "
            f"{failed}; free space there, then run.resume=auto goes on {t.states.newest}"
        )
        stays_full.shared = True
        raise stays_full
    return f"but its state could not be saved ({failed}); run.resume=auto goes on {t.states.newest}"

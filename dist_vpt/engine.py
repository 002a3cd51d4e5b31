"""The engine: one training step, fit, evaluate. It knows no method and no task by name.

B images of a micro-batch, S image side, K classes, W processes.

A global batch of ``train.batch_size`` images is split over W processes x ``train.accumulate`` micro-batches. Losses
are summed and divided by the weight of the global batch, so that a step is the same whatever W and accumulate.
"""

import math
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from dist_vpt.checkpoint import Progress, States, collect, write_adapters
from dist_vpt.data.loaders import Batch, EvalBatches, TrainBatches
from dist_vpt.errors import Interrupted, RunFailed
from dist_vpt.methods import Method
from dist_vpt.metrics import Scores
from dist_vpt.monitor import Monitor
from dist_vpt.optim import multiplier, set_lr
from dist_vpt.recipe import Recipe
from dist_vpt.runfolder import RunFolder


@dataclass
class Training:
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
    monitor: Monitor
    facts: dict[str, Any]  # written into the head of adapter files
    progress: Progress
    parameters: dict[str, int]  # trained, total

    @property
    def step(self) -> int:
        """Optimiser steps done since the start of the run."""
        return self.progress.epoch * self.train.steps_per_epoch + self.progress.step

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


def train_step(t: Training, batches: list[Batch], stop: "StopSignal", *, norms: bool) -> Step:
    """One optimiser step on this process's micro-batches of one global batch. A collective call."""
    accelerator, recipe, device = t.accelerator, t.recipe, t.accelerator.device
    lr = recipe.optim.peak_lr(recipe.train.batch_size)
    lr *= multiplier(recipe.optim, t.step, t.train.steps_per_epoch, recipe.train.epochs)
    set_lr(t.optimizer, lr)
    torch.manual_seed(_fold(recipe.seed, t.step, accelerator.process_index))  # dropout: a function of the step
    moved = [_to(batch, device) for batch in batches]
    weights = [t.class_weights[batch["labels"]] * batch["weight"] for batch in moved]
    local = torch.stack([torch.stack([w.sum() for w in weights]).sum(), stop.tensor(device)])
    weight, stop.seen = accelerator.reduce(local, "sum").tolist()
    scale = accelerator.num_processes * recipe.train.accumulate / max(weight, 1e-12)
    sums, gradient_norm, before = torch.zeros(3, device=device, dtype=torch.float64), None, None
    for batch, weights_B in zip(moved, weights, strict=True):
        with accelerator.accumulate(t.model):
            logits_BK = t.model(batch["images"])
            losses_B = F.cross_entropy(
                logits_BK, batch["labels"], reduction="none", label_smoothing=recipe.train.label_smoothing
            )
            loss = (losses_B * weights_B).sum()
            right = ((logits_BK.argmax(1) == batch["labels"]) * batch["weight"]).sum()
            seen = accelerator.reduce(torch.stack([loss.detach(), right, batch["weight"].sum()]).double(), "sum")
            _check_finite("loss", float(seen[0]), t)  # before backward: DeepSpeed's backward also steps
            sums += seen
            if norms and accelerator.sync_gradients:
                before = _trained_shards(t.method)
            accelerator.backward(loss * scale)
            if accelerator.sync_gradients:
                gradient_norm = _clip(t)
            t.optimizer.step()
            t.optimizer.zero_grad()
    parameter_norm, update_norm = _norms(t, before) if before is not None else (None, None)
    return Step(
        float(sums[0]) / max(weight, 1e-12),
        float(sums[1]),
        float(sums[2]),
        lr,
        gradient_norm,
        parameter_norm,
        update_norm,
    )


def fit(t: Training) -> None:
    """Train from ``t.progress`` to the end, evaluating and saving as the recipe says.

    Raises RunFailed for a loss that is not finite and Interrupted, with the state saved, after SIGTERM or SIGUSR1.
    """
    recipe, progress, began = t.recipe, t.progress, time.monotonic() - t.progress.seconds
    with StopSignal() as stop:
        while progress.epoch < recipe.train.epochs and not progress.ended:
            t.model.train()
            for batches in t.train.epoch(progress.epoch, progress.step):
                logged = (t.step + 1) % recipe.run.log_every == 0
                step = train_step(t, batches, stop, norms=logged)
                progress.step += 1
                progress.images += int(step.images)
                progress.sums = [
                    progress.sums[0] + step.loss * step.images,
                    progress.sums[1] + step.correct,
                    progress.sums[2] + step.images,
                ]
                progress.seconds = time.monotonic() - began
                t.monitor.step(t.step, step, progress, logged=logged)
                within = progress.step < t.train.steps_per_epoch
                every = recipe.run.save_every
                if stop.seen or (every and within and t.step % every == 0):
                    _save(t)
                if stop.seen:
                    raise Interrupted(
                        f"{t.folder.path}: stopped at step {t.step} with its state saved; run.resume=auto goes on"
                    )
            _end_epoch(t)
            progress.seconds = time.monotonic() - began
            over = progress.ended or progress.epoch == recipe.train.epochs
            if over or not recipe.run.save_every or t.step % recipe.run.save_every == 0:
                _save(t)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: nn.Module, batches: EvalBatches, classes: int, *, confusion: bool = False
) -> Scores:
    """Score a split, every example once over all processes. A collective call."""
    model.eval()
    scores = Scores(classes, accelerator.device, confusion=confusion)
    for cpu_batch in batches:
        batch = _to(cpu_batch, accelerator.device)
        scores.update(model(batch["images"]), batch["labels"], batch["weight"], batch["index"])
    return scores


class StopSignal:
    """SIGTERM and SIGUSR1 ask for a stop at the next step boundary, where all processes agree on it."""

    def __init__(self) -> None:
        self.asked = False
        self.seen: float = 0.0  # how many processes were asked, after the last agreement

    def __enter__(self) -> "StopSignal":
        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        self.previous = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def tensor(self, device: torch.device) -> Tensor:
        return torch.tensor(float(self.asked), device=device)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore[return-value, attr-defined]


def _fold(*numbers: int) -> int:
    """A seed from several numbers (64-bit FNV-1a): neighbours in any of them give unrelated seeds."""
    folded = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            folded = ((folded ^ byte) * 0x100000001B3) % 2**64
    return folded % 2**63


def _check_finite(name: str, value: float, t: Training) -> None:
    if not math.isfinite(value):
        raise RunFailed(
            f"{t.folder.path}: the {name} is {value} at step {t.step} (epoch {t.progress.epoch}), before the optimiser "
            "step; lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_norm"
        )


def _clip(t: Training) -> float | None:
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


def _norms(t: Training, before: list[Tensor]) -> tuple[float, float]:
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


def _end_epoch(t: Training) -> None:
    """Metrics, best epoch and early stopping at the end of an epoch."""
    recipe, progress = t.recipe, t.progress
    loss, correct, images = progress.sums
    images = max(images, 1.0)
    epoch = progress.epoch
    t.monitor.scores(epoch, t.step, "train", {"loss": loss / images, "top1": 100 * correct / images})
    progress.epoch, progress.step, progress.sums = epoch + 1, 0, [0.0, 0.0, 0.0]
    final = progress.epoch == recipe.train.epochs
    if t.val is not None and (final or progress.epoch % recipe.train.eval_every == 0):
        scores = evaluate(t.accelerator, t.model, t.val, len(t.class_weights)).compute()
        t.monitor.scores(epoch, t.step, "val", scores)
        progress.last = {"epoch": epoch, "val": scores}
        stopping = recipe.train.early_stop
        if not progress.best or scores["top1"] > progress.best["val"]["top1"] + (stopping.min_delta if stopping else 0):
            progress.best, progress.without_rise = {"epoch": epoch, "val": scores}, 0
            tensors = collect(t.method)
            if t.accelerator.is_main_process:
                write_adapters(t.folder.best, tensors, t.facts | {"epoch": epoch})
        else:
            progress.without_rise += 1
        progress.ended = stopping is not None and progress.without_rise >= stopping.patience
    else:
        progress.last = {"epoch": epoch}


def _save(t: Training) -> None:
    t.progress.metrics_bytes = t.folder.metrics.stat().st_size if t.folder.metrics.exists() else 0
    t.states.save(t.model, t.method, t.optimizer, t.progress, t.step)

"""A VQT run's features of all images, and heads that are trained on them.

B images of a batch, n of a split, F features that the run's queries find, K classes.

With fixed queries the features of all images are one fixed matrix for each split, [n, F]: it is computed once, as
in an evaluation (no augmentation, no dropout), and heads that are trained on it never call the backbone.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.splits import Split
from dist_vpt.data.workers import PADDING
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.frozen_stream.cache import CachedBatches, StreamCache
from dist_vpt.frozen_stream.observe import StreamOutput, compute_stream
from dist_vpt.frozen_stream.placement import BUDGET
from dist_vpt.methods.vqt import VQT
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, restore
from dist_vpt.runs.folder import RESUME_HINT
from dist_vpt.runs.progress import Progress
from dist_vpt.training.calibration import NO_VAL, temperature_on_val
from dist_vpt.training.components import Components, build_reader
from dist_vpt.training.metrics import Scores
from dist_vpt.training.optim import build_optimizer, set_lr
from dist_vpt.training.step import DIVERGED_FIX, clip_gradients, image_losses, learning_rate, not_finite, weigh


@dataclass(frozen=True)
class Source:
    """The run that is compressed."""

    recipe: Recipe
    adapters: Path
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    scored: str  # the split that accuracies are of


@dataclass(frozen=True)
class Features:
    """A run's features of all images, in batches that hold them as what was pooled, [B, F]."""

    source: Source
    method: VQT  # of the run
    train: TrainBatches
    val: EvalBatches | None
    scored: EvalBatches
    class_weights: Tensor  # [K]
    skipped: set[str]  # files that could not be read
    stop: StopSignal

    @property
    def device(self) -> torch.device:
        return self.class_weights.device


@dataclass(frozen=True)
class Trained:
    """The adapters of one fraction, and how they came about."""

    tensors: dict[str, Tensor]
    last: dict[str, Any]  # epoch and scores
    best: dict[str, Any]  # of the best epoch on val; empty without val
    best_tensors: dict[str, Tensor]
    seconds: float
    images: int  # trained on


def fix_features(
    source: Source, parts: Components, method: VQT, accelerator: RankAccelerator, stop: StopSignal
) -> Features:
    """The features of the splits that are trained on and scored, each image computed once.

    Raises UserError where memory does not hold them, DataError for an image that cannot be read, and Interrupted where
    a stop was requested.
    """
    recipe, device = source.recipe, accelerator.device
    has_val = recipe.data.train_on == "train" and parts.splits.val is not None
    names = dict.fromkeys([recipe.data.train_on, *(["val"] if has_val else []), source.scored])
    needed = sum(len(parts.splits[name]) for name in names) * method.all_features * 4
    free = psutil.virtual_memory().available * BUDGET
    if needed > free:
        raise UserError(
            f"compress: the features take {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB of memory may be used; "
            "free some" + (", or leave the test split out with train.test=false" if has_val else "")
        )
    method.to(device).eval()
    caches = {
        name: _cache_features(method, parts.evaluation(name, 0, 1), parts.splits[name], device, stop) for name in names
    }

    def evaluation(name: str) -> EvalBatches:
        batches = parts.evaluation(name, 0, 1)
        batches.use(caches[name])
        return batches

    # Micro-batches are for memory, and a head needs none: one after the other or not, the sum is the same.
    whole = recipe.model_copy(update={"train": recipe.train.model_copy(update={"grad_accum_steps": 1})})
    train = replace(parts, recipe=whole).training(0, 1)
    train.use(caches[recipe.data.train_on])
    return Features(
        source=source,
        method=method,
        train=train,
        val=evaluation("val") if has_val else None,
        scored=evaluation(source.scored),
        class_weights=parts.class_weights(device),
        skipped={file for cache in caches.values() for file in cache.skipped},
        stop=stop,
    )


@torch.no_grad()
def _cache_features(
    method: VQT, batches: EvalBatches, split: Split, device: torch.device, stop: StopSignal
) -> CachedBatches:
    features_nF = torch.empty(len(split), method.all_features)
    readable_n = np.zeros(len(split), bool)
    try:
        for batch in batches:
            _raise_on_stop(stop)
            observed = compute_stream(method.backbone, batch["images"].to(device), method.spec)
            real = batch["index"] != PADDING  # batches may be filled up to one size
            index = batch["index"][real]
            features_nF[index] = method.features(observed).cpu()[real]
            readable_n[index.numpy()] = batch["weight"][real].numpy() > 0
    finally:
        batches.close()
    return CachedBatches(StreamCache(StreamOutput(features_nF), readable_n), split.labels, batches.skipped)


def _raise_on_stop(stop: StopSignal) -> None:
    if stop.requested:
        raise Interrupted(f"compress: stopped; {RESUME_HINT}, from the fractions that are written")


def group_lasso(weight_KF: Tensor) -> Tensor:
    """The sum over features f of ||W[:, f]||_2; the gradient of a norm that is 0 is taken as 0."""
    return torch.linalg.vector_norm(weight_KF, dim=0).sum()


def head_loss(  # noqa: PLR0917 (what the loss is made of)
    logits_BK: Tensor, labels_B: Tensor, weights_B: Tensor, smoothing: float, weight_KF: Tensor, lasso: float
) -> Tensor:
    """The engine's loss of a batch, its mean weighted by ``weights_B``, and the group lasso on top."""
    losses_B = image_losses(logits_BK, labels_B, smoothing)
    loss = (losses_B * weights_B).sum() / weights_B.sum().clamp(min=1e-12)
    return loss + lasso * group_lasso(weight_KF) if lasso else loss


def best_features(weight_KF: Tensor, number: int) -> Tensor:
    """The features with the largest ||W[:, f]||_2, rising, int64 [number]; of equals the first."""
    norms_F = torch.linalg.vector_norm(weight_KF.detach(), dim=0)
    return norms_F.argsort(descending=True, stable=True)[:number].sort().values.cpu()


def fresh_head(f: Features, recipe: Recipe, kept: Tensor | None = None) -> VQT:
    """A reader with the run's queries and a new head, seeded by the recipe, on all features or the kept ones."""
    reader = build_reader(recipe, f.method.backbone, len(f.source.classes))
    assert isinstance(reader, VQT)
    head = {name for name, _ in reader.head.named_parameters(prefix="head")}
    queries = {name: tensor for name, tensor in f.source.tensors.items() if name not in head}
    chosen = {} if kept is None else {"kept": kept}
    if kept is not None and "feature_norm.std" in queries:
        mean_F, std_F = queries["feature_norm.mean"], queries["feature_norm.std"]
        shorter = (len(kept) / len(std_F)) ** 0.5  # standardized features have one length, however many they are
        queries |= {"feature_norm.mean": mean_F[kept], "feature_norm.std": std_F[kept] * shorter}
    restore(reader, {**collect(reader), **queries, **chosen}, f.source.adapters)
    return reader.to(f.device).eval()


def train_head(f: Features, reader: VQT, lasso: float = 0.0) -> Trained:
    """Train a reader's head on the features as the recipe says, with its best epoch and early stopping.

    Raises RunFailed for a loss that is not finite, and Interrupted after a stop request.
    """
    recipe, began = f.source.recipe, time.monotonic()
    progress, best_tensors = Progress(), {}
    # Nothing leads from fixed features to the queries: they get no gradient, and the optimizer skips them.
    optimizer = build_optimizer(recipe.optim, reader)
    while progress.epoch < recipe.train.epochs and not progress.ended:
        for (fetched,) in f.train.epoch(progress.epoch):
            step = progress.epoch * f.train.steps_per_epoch + progress.step
            set_lr(optimizer, learning_rate(recipe.optim, recipe.train, step, f.train.steps_per_epoch))
            batch = send_to_device(fetched, f.device)
            labels_B, weights_B = batch["labels"], weigh(batch, f.class_weights)
            logits_BK = reader.classify(batch["images"].pooled)
            loss = head_loss(logits_BK, labels_B, weights_B, recipe.train.label_smoothing, head_weight(reader), lasso)
            loss.backward()
            [norm] = clip_gradients([list(reader.head.parameters())], recipe.optim.clip_norm)
            found = not_finite("loss", loss.item(), step) or not_finite("gradient norm", norm.item(), step)
            if found:
                raise RunFailed(f"compress: {found}; {DIVERGED_FIX}")
            optimizer.step()
            optimizer.zero_grad()
            correct = ((logits_BK.argmax(1) == labels_B) * batch["weight"]).sum()
            progress.step += 1
            progress.count(loss.item(), correct.item(), batch["weight"].sum().item())
        _raise_on_stop(f.stop)
        progress.end_epoch()
        due = progress.epoch == recipe.train.epochs or progress.epoch % recipe.train.eval_every == 0
        if f.val is not None and due and progress.scored(score(f, reader, f.val), recipe.train.early_stop):
            best_tensors = collect(reader)
    seconds = time.monotonic() - began
    return Trained(collect(reader), progress.last, progress.best, best_tensors, seconds, progress.images)


def score(f: Features, reader: VQT, batches: EvalBatches) -> dict[str, float]:
    """Scores of a reader's head on the features of a split."""
    return _scored(f, reader, batches).compute()


def score_at_end(f: Features, reader: VQT) -> dict[str, Any]:
    """The scores of test with a temperature fitted on val, as those of a run; where there is no test, those of val."""
    if f.source.scored != "test":
        return {f.source.scored: score(f, reader, f.scored)}
    temperature: dict[str, Any] = {"value": None, "reason": NO_VAL}
    if f.val is not None:
        temperature = temperature_on_val(_scored(f, reader, f.val, keep="logits"))
    value = temperature["value"]
    scores = _scored(f, reader, f.scored, temperature=value).compute()
    return {"temperature": temperature, "test": scores | ({"ece_scaled": None} if value is None else {})}


@torch.no_grad()
def _scored(f: Features, reader: VQT, batches: EvalBatches, **options: Any) -> Scores:
    scores = Scores(len(f.source.classes), f.device, batches.split, **options)
    for fetched in batches:
        batch = send_to_device(fetched, f.device)
        logits_BK = reader.classify(batch["images"].pooled)
        scores.update(logits_BK, batch["labels"], batch["weight"], batch["index"])
    return scores


def head_weight(reader: VQT) -> Tensor:
    """The weights of a reader's head, [K, F]."""
    assert isinstance(reader.head, nn.Linear)
    return reader.head.weight

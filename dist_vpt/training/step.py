"""The parts of an optimizer step, written once: for a run, for trials that train together, for heads on fixed features.

B images of a micro-batch, K classes, T trials. The planner counts the memory of the same parts.

The loss of a global batch is sum(class weight x image weight x cross entropy) / sum(class weight x image weight), both
sums over all micro-batches of all processes, so that a step is the same however the batch is split. Where images have
several labels, an image's loss is the mean over classes of the binary cross entropy, in which a class's positives have
its class weight.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dist_vpt.data.loaders import Batch
from dist_vpt.distributed.collectives import RankAccelerator, raise_on_all_ranks
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.distributed.zero import held
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.prefetch import DeviceCopy
from dist_vpt.recipe.schema import OptimConfig, TrainConfig
from dist_vpt.training.agreement import Agreement
from dist_vpt.training.optim import multiplier

DIVERGED_FIX = "lower optim.lr, lengthen optim.warmup_epochs or set optim.clip_norm"


@dataclass(frozen=True)
class Step:
    """The metrics of one optimizer step."""

    loss: float  # weighted mean over the global batch
    correct: float  # images; of images with several labels the share of classes that are right counts
    images: float
    lr: float
    gradient_norm: float | None  # before clipping; None where DeepSpeed does not report it
    parameter_norm: float | None  # of the trained tensors; like update_norm known at logged steps alone
    update_norm: float | None


def weigh(batch: Batch, class_weights_K: Tensor) -> Tensor:
    """The weight of each image in the loss, [B]: 0 for padding and for images that could not be read."""
    if batch["labels"].ndim == 2:  # of several labels an image: classes are weighed inside of its loss
        return batch["weight"]
    return class_weights_K[batch["labels"]] * batch["weight"]


def weigh_global_batch(
    accelerator: RankAccelerator,
    fetched: list[Batch] | UserError,
    class_weights_K: Tensor,
    stop: StopSignal,
    *,
    augment: Callable[[Batch, Tensor], Batch] | None = None,
    agreement: Agreement | None = None,
) -> tuple[list[tuple[Batch, Tensor]], Tensor]:
    """This process's micro-batches on its device with the weight of each image, and the weight of the global batch, [].

    A collective call, in which all processes also learn of an error, which is raised on all, and of a stop request.
    Several on GPUs learn of these when they read the flags that ``agreement`` gets. They and a single process read
    nothing from their devices here. To a GPU the micro-batches are copied beside the step before,
    which the device still computes. ``augment``: what is done to each there, given its index on the host, too.
    """
    failed, late = isinstance(fetched, UserError), agreement is not None and agreement.is_late(accelerator)
    if agreement is not None:
        batches = agreement.batches(accelerator, fetched)
    else:
        batches = [] if isinstance(fetched, UserError) else fetched
    copies = [DeviceCopy(batch, accelerator.device, "batches") for batch in batches]
    on_device = [copy.arrived() for copy in copies]
    if augment is not None:
        on_device = [augment(batch, host["index"]) for batch, host in zip(on_device, batches, strict=True)]
    weights = [weigh(batch, class_weights_K) for batch in on_device]
    local = torch.stack([weights_B.sum() for weights_B in weights]).sum() if weights else class_weights_K.new_zeros(())
    any_failed, stopped = float(failed), float(stop.requested)
    if accelerator.num_processes > 1:
        flags = [local.new_full((), flag) for flag in (any_failed, stopped)]  # a copy from the host would be waited for
        with accelerator.status.in_collective():
            local, *flags = accelerator.reduce(torch.stack([local, *flags]), "sum")
            any_failed, stopped = (0.0, float(stop.agreed)) if late else torch.stack(flags).tolist()
        if agreement is not None:
            agreement.flags = torch.stack(flags) if late else None
    if any_failed:
        raise_on_all_ranks(accelerator, fetched if isinstance(fetched, UserError) else None)
    stop.agreed = stopped > 0
    # A batch that holds only unreadable images has no weight, and its loss is 0.
    return list(zip(on_device, weights, strict=True)), local.clamp_min(1e-12)


def fold_in(*numbers: int) -> int:
    """A seed from several numbers (64-bit FNV-1a): neighbors in any of them give unrelated seeds."""
    folded = 0xCBF29CE484222325
    for number in numbers:
        for byte in number.to_bytes(8, "little"):
            folded = ((folded ^ byte) * 0x100000001B3) % 2**64
    return folded % 2**63


def image_losses(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, class_weights_K: Tensor | None = None
) -> Tensor:
    """The loss of each image, [B] for logits [B, K] and [T, B] for logits [T, B, K].

    Labels int64 [B]: the cross entropy. Labels float [B, K] of 0 and 1, several an image: the mean over classes of the
    binary cross entropy, in which positives have the weight of their class, and targets are ``smoothing`` / 2 away from
    0 and 1 (as in Keras). ``class_weights_K`` of one label an image are in ``weigh``.
    """
    if labels.ndim == 2:
        targets = (labels * (1 - smoothing) + smoothing / 2).to(logits.dtype).expand(logits.shape)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none", pos_weight=class_weights_K)
        return losses.mean(-1)
    labels = labels.expand(logits.shape[:-1])
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", label_smoothing=smoothing)
    return losses.view_as(labels)


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly, [..., B] for logits [..., B, K].

    Of several labels an image, float [B, K]: the share of its classes that are right at a probability of 0.5.
    """
    if labels.ndim == 2:
        return ((logits > 0) == (labels > 0)).float().mean(-1)
    return logits.argmax(-1) == labels


def for_each_label(logits_BK: Tensor, labels: Tensor) -> Tensor:
    """The logits once for each label: images mixed in pairs have labels of their own, then their partners', [2 B]."""
    return logits_BK if len(labels) == len(logits_BK) else logits_BK.repeat(2, 1)


def learning_rate(optim: OptimConfig, train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0 over the whole run."""
    factor = multiplier(optim, step, steps_per_epoch, train.epochs)
    return optim.peak_lr(train.batch_size) * factor


def not_finite(name: str, value: float, step: int) -> str:
    """How to report a value that is not finite, or "" where it is."""
    return "" if math.isfinite(value) else f"the {name} is {value} at step {step}"


def clip_gradients(groups: Sequence[Sequence[nn.Parameter]], clip_norm: float | None) -> Tensor:
    """Clip the gradients of each group by itself; returns their norms before that, one a group."""
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    if clip_norm is not None:
        for group, norm in zip(groups, norms, strict=True):
            clip_grads_with_norm_(group, clip_norm, norm)
    return torch.stack(norms)


def snapshot(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """float32 copies of what this process holds of the parameters (under ZeRO-3, its shards)."""
    return [held(p).detach().float().clone() for p in parameters]


def squared_norms(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """The squared L2 norms of parameters and of their last update, [2]."""
    parameters = torch.stack([(a**2).sum() for a in after]).sum()
    updates = torch.stack([((a - b) ** 2).sum() for a, b in zip(after, before, strict=True)]).sum()
    return torch.stack([parameters, updates])


def all_reduced(accelerator: RankAccelerator, sums: Tensor) -> dict[str, Tensor]:
    """Loss, correct answers and images of the global batch, [] each, of their sums here, [3]. A collective call."""
    with accelerator.status.in_collective():
        summed = accelerator.reduce(sums, "sum")
    return dict(zip(("loss", "correct", "images"), summed, strict=True))


def update_norms(
    accelerator: RankAccelerator, before: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Squared norms of the trained tensors and of their last update, []. A collective call under ZeRO-3.

    ``before``: their snapshot before the step.
    """
    squares = squared_norms(before, snapshot(parameters)).to(accelerator.device)
    if any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        squares = accelerator.reduce(squares, "sum")
    return dict(zip(("parameters", "update"), squares, strict=True))


def is_deepspeed(accelerator: RankAccelerator) -> bool:
    """Whether DeepSpeed steps, clips and reduces."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def clip(
    accelerator: RankAccelerator, parameters: Sequence[nn.Parameter], clip_norm: float | None
) -> dict[str, Tensor]:
    """Clip the gradients; their norm before that, [], unless DeepSpeed, which has clipped them, does not report it."""
    if not is_deepspeed(accelerator):
        accelerator.unscale_gradients()
        return {"gradient norm": clip_gradients([parameters], clip_norm)[0]}
    norm = accelerator.clip_grad_norm_(parameters, clip_norm)
    return {} if norm is None else {"gradient norm": torch.as_tensor(norm, dtype=torch.float32).to(accelerator.device)}

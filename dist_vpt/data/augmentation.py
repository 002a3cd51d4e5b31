"""timm's mixup, CutMix and random erasing as pure functions of (seed, epoch, step) and (seed, epoch, image).

b images of a micro-batch, S image side.

timm draws from the generators of Python, numpy and torch, which are seeded for each global batch, or image. So a run
resumes with the same images, and neither processes nor micro-batches change any.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dist_vpt.data.rand_augment import ERASING, MIXING, seeded
from dist_vpt.data.workers import PADDING, Batch

ErasingMode = Literal["const", "rand", "pixel"]


@dataclass(frozen=True)
class BatchAugmentation:
    """What is done to batches on the device: mixup or CutMix, then random erasing, in the order of timm's loader.

    Pairs are the images of a micro-batch and those of the batch turned round, as TrainBatches deals them with
    ``pairs``.
    """

    mixup_alpha: float
    cutmix_alpha: float
    prob: float
    switch_prob: float
    erasing: float  # probability
    erasing_mode: ErasingMode
    seed: int
    mean: Tensor  # of the channels of pixels in 0..255, [1, 3, 1, 1]
    std: Tensor

    def __call__(self, batch: Batch, index_b: Tensor, epoch: int, step: int) -> Batch:
        """A batch on its device, augmented. ``index_b``: its index, on the host; ``step``: of the epoch.

        A mixed batch has b images, float32, and 2 b labels and weights: each image's own, then its partner's, with
        their shares of it.
        """
        made = self._mixed(batch, epoch, step) if self.mixup_alpha or self.cutmix_alpha else batch
        return self._erased(made, index_b, epoch) if self.erasing else made

    def _mixed(self, batch: Batch, epoch: int, step: int) -> Batch:
        from timm.data import Mixup

        images, labels, weight_b = batch["images"], batch["labels"], batch["weight"]
        mixup = Mixup(
            mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha, prob=self.prob, switch_prob=self.switch_prob,
            label_smoothing=0.0, num_classes=2,
        )  # fmt: skip
        half = len(images) // 2
        of_half_b = torch.arange(2, device=labels.device).repeat_interleave(half)  # as if these were the labels
        with seeded(self.seed, epoch, step, MIXING):
            mixed, shares_b2 = mixup(images.to(torch.float32, copy=True), of_half_b)
        # Beside padding, and beside an image that could not be read, an image stays as it is.
        has_partner_b = weight_b.flip(0) > 0
        own_b = torch.where(has_partner_b, shares_b2.gather(1, of_half_b[:, None])[:, 0], 1.0)
        return Batch(
            images=torch.where(has_partner_b[:, None, None, None], mixed, images),
            labels=torch.cat([labels, labels.flip(0)]),
            weight=torch.cat([own_b * weight_b, (1 - own_b) * weight_b]),
            index=batch["index"],
        )

    def _erased(self, batch: Batch, index_b: Tensor, epoch: int) -> Batch:
        from timm.data.random_erasing import RandomErasing

        images_b3SS = batch["images"]
        erase = RandomErasing(self.erasing, mode=self.erasing_mode, device=images_b3SS.device)
        boxes_b3SS = torch.full(images_b3SS.shape, math.nan, device=images_b3SS.device)  # elsewhere than in them
        for box_3SS, i in zip(boxes_b3SS, index_b.tolist(), strict=True):
            if i != PADDING:
                with seeded(self.seed, epoch, i, ERASING) as seed:
                    torch.manual_seed(seed)
                    erase(box_3SS)
        # timm fills boxes of normalized images.
        filled_b3SS = boxes_b3SS * self.std + self.mean
        return Batch(**{**batch, "images": torch.where(boxes_b3SS.isnan(), images_b3SS, filled_b3SS)})

"""Batches: the same global batches whatever the number of processes, workers or accumulated micro-batches.

n examples of the split, b images of a micro-batch, S image side. The order of an epoch is a pure function of
(seed, epoch) and the labels, and optimizer step s takes positions s * batch_size onwards of it, so a run can stop after
any step and continue elsewhere.
"""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch

from dist_vpt.data.joined import JoinedSource
from dist_vpt.data.sampling import Sampling, earlier_draws, epoch_order
from dist_vpt.data.splits import Split
from dist_vpt.data.tasks import Cache
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.data.workers import (
    PADDING,
    BadImages,
    Batch,
    BatchSource,
    ImageBatches,
    ImageReader,
    Request,
    WorkerSource,
)
from dist_vpt.errors import UserError

AGAIN = 2**32  # added to the epoch for each time that an image has been drawn in it before


class _Batches:
    """Batches from a source that can be replaced."""

    _source: BatchSource

    @property
    def skipped(self) -> set[str]:
        """Files that this process could not read so far (``on_decode_error="skip"``)."""
        return self._source.skipped

    @property
    def ahead(self) -> int:
        """How many batches workers make, or have made, before they are asked for."""
        return self._source.ahead if isinstance(self._source, WorkerSource) else 0

    def join(self, others: Sequence["_Batches"]) -> Self:
        """Batches of images for several backbones (``Joined``): its own, and those of others of the same split."""
        if others:
            self._source = JoinedSource([self._source, *(other._source for other in others)])
        return self

    def use(self, source: BatchSource, backbone: int = 0) -> None:
        """Take the same batches from another source from now on; of several backbones, those of one of them."""
        if isinstance(self._source, JoinedSource):
            self._source.replace(backbone, source)
            return
        self._source.close()
        self._source = source

    def keep_on(self, device: torch.device, budget: float) -> None:
        """Keep the images of ``data.cache: memory`` on a device, if they take at most ``budget`` bytes there.

        Called before the first pass. Batches of a replaced source, and those without a cache, stay as they are.
        """
        if isinstance(self._source, WorkerSource | JoinedSource):
            self._source.keep_on(device, budget)

    def close(self) -> None:
        """End the worker processes at once; a later pass starts new ones."""
        self._source.close()


class TrainBatches(_Batches):
    """Shuffled batches for training; nothing is dropped, the last global batch of an epoch is smaller.

    With ``sampling="balanced"`` an epoch draws as many images as the split has, all classes alike, and an image may
    come several times, each time cut and flipped anew.
    """

    def __init__(
        self,
        split: Split,
        transform: ImageTransform,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        local_world: int | None = None,  # processes on this machine, where they are not all
        seed: int = 0,
        workers: int = 0,
        on_decode_error: BadImages = "fail",
        max_megapixels: float = 178.0,
        cache: Cache = "none",
        same_size: bool = False,
        sampling: Sampling = "shuffle",
    ):
        """``batch_size`` images per optimizer step: ``world`` processes of ``accumulate`` micro-batches.

        ``same_size``: padding makes the last batch as large as the others, as compiled blocks want it.
        """
        parts = world * accumulate
        if batch_size < 1 or batch_size % parts:
            lower = batch_size // parts * parts
            sizes = f"{lower} or {lower + parts}" if lower > 0 else f"{parts}"
            raise UserError(
                f"batch_size {batch_size}: must be a multiple of {parts} = {world} processes x {accumulate} "
                f"accumulated micro-batches; use {sizes}"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(split) // batch_size)
        self.images, self._seed, self._split, self._sampling = len(split), seed, split, sampling
        self._accumulate, self._rank, self._world = accumulate, rank, world
        self._multiple = batch_size if same_size else parts
        reader = ImageReader(split, transform, True, on_decode_error, max_megapixels)
        batches = ImageBatches(reader, seed)
        self._source = WorkerSource(
            batches, batch_size // parts, workers, cache, range(len(split)), local_world or world
        )

    def __len__(self) -> int:
        return self.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """For each optimizer step from ``start_step`` on, its micro-batches on this process.

        Starting another epoch ends the one before.
        """
        parts = self._world * self._accumulate
        order = epoch_order(self._sampling, self._split, self._seed, epoch)
        # Of an image that comes again in an epoch, other parts are drawn.
        epochs = None if self._sampling == "shuffle" else epoch + AGAIN * earlier_draws(order)
        requests: list[Request] = []
        for step in range(start_step, self.steps_per_epoch):
            first, last = step * self.batch_size, min((step + 1) * self.batch_size, self.images)
            places = _padded(np.arange(first, last), self._multiple)
            # Dealt round-robin, so that padding is spread over processes and micro-batches.
            for micro in range(self._accumulate):
                mine = places[micro * self._world + self._rank :: parts]
                indices = np.where(mine == PADDING, PADDING, order[mine])
                requests.append((epoch if epochs is None else epochs[mine], indices))
        batches = self._source(requests)
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self._accumulate)]


class EvalBatches(_Batches):
    """Every example of a split once, in the split's order, dealt to the processes round-robin."""

    def __init__(
        self,
        split: Split,
        transform: ImageTransform,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        local_world: int | None = None,  # processes on this machine, where they are not all
        workers: int = 0,
        on_decode_error: BadImages = "fail",
        max_megapixels: float = 178.0,
        cache: Cache = "none",
        same_size: bool = False,
    ):
        """``batch_size`` images per batch and process; all processes yield equally many and equally large.

        ``same_size``: padding makes the last of several batches as large as the others.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self.split, self.multiple = split.name, split.multiple
        several = same_size and len(split) > world * batch_size
        self._indices = _padded(np.arange(len(split)), world * batch_size if several else world)[rank::world]
        self._starts = range(0, len(self._indices), batch_size)
        self._batch_size = batch_size
        reader = ImageReader(split, transform, False, on_decode_error, max_megapixels)
        mine = [int(i) for i in self._indices if i != PADDING]
        self._source = WorkerSource(ImageBatches(reader, 0), batch_size, workers, cache, mine, local_world or world)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Batch]:
        return self._source([(0, self._indices[start : start + self._batch_size]) for start in self._starts])


def _padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(indices, (0, -len(indices) % multiple), constant_values=PADDING)

"""Batches for several backbones: the same images from several sources, each with a preprocessing of its own.

b images of a micro-batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dist_vpt.data.workers import Batch, BatchSource, Request, WorkerSource


class Joined(NamedTuple):
    """The same images for each of several backbones: their pixels, or what the frozen stream holds of them."""

    parts: tuple[Any, ...]

    def where(self, kept_b: torch.Tensor) -> "Joined":
        """Some of the images, which must be pixels."""
        return Joined(tuple(part[kept_b] for part in self.parts))


class JoinedSource:
    """Asks several sources for the same images."""

    def __init__(self, sources: Sequence[BatchSource]):
        self.sources = list(sources)

    @property
    def skipped(self) -> set[str]:
        """Files that one of them could not read so far."""
        return set().union(*(source.skipped for source in self.sources))

    def __call__(self, requests: list[Request]) -> Iterator[Batch]:
        for batches in zip(*(source(requests) for source in self.sources), strict=True):
            # A file that cannot be read for one of them counts for none.
            weight_b = torch.stack([batch["weight"] for batch in batches]).amin(0)
            first = batches[0]
            yield Batch(
                images=Joined(tuple(batch["images"] for batch in batches)),
                labels=first["labels"],
                weight=weight_b,
                index=first["index"],
            )

    def replace(self, number: int, source: BatchSource) -> None:
        """Take one backbone's batches from another source from now on."""
        self.sources[number].close()
        self.sources[number] = source

    def keep_on(self, device: torch.device, budget: float) -> None:
        """As for batches of one backbone, which share the budget."""
        workers = [source for source in self.sources if isinstance(source, WorkerSource)]
        for source in workers:
            source.keep_on(device, budget / len(workers))

    def close(self) -> None:
        for source in self.sources:
            source.close()

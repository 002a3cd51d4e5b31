"""Readers whose trained tensors have equal shapes, each tensor of all of them held as one.

T readers. One product, one reduction and one update then serve all of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


class Stackable(Protocol):
    """What of a reader a stack sees."""

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass
class RandomSource:
    """A reader's own random numbers (dropout). They depend on the seed alone, in whatever order readers draw."""

    generator: torch.Generator
    seed: int = 0

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> "RandomSource":
        return cls(torch.Generator(device)).restart(seed)

    def restart(self, seed: int) -> "RandomSource":
        self.seed = seed
        self.generator.manual_seed(seed)
        return self


Sources = Sequence[RandomSource] | None  # of the readers of a stack; None: torch's default one


@dataclass(frozen=True)
class ReaderStack:
    """``trained`` tensors, and ``fixed`` ones, which were measured or selected: both have a leading dimension of T."""

    readers: Sequence[Stackable]
    trained: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.readers[0].adapter_tensors() if name not in self.trained]
        each = [dict(reader.adapter_tensors()) for reader in self.readers]
        object.__setattr__(self, "fixed", {name: stacked([own[name] for own in each]) for name in names})

    @classmethod
    def of(cls, readers: Sequence[Stackable]) -> "ReaderStack":
        """A copy of their tensors, through which gradients reach the readers' own."""
        each = [dict(reader.trainable()) for reader in readers]
        return cls(readers, {name: stacked([own[name] for own in each]) for name in each[0]})

    def of_each(self) -> Iterator[dict[str, Tensor]]:
        """The trained tensors of one reader after the other."""
        columns = [tensor.unbind() for tensor in self.trained.values()]  # whose backward is one pass, not T
        for row in zip(*columns, strict=True):
            yield dict(zip(self.trained, row, strict=True))


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[T, ...]; of a single one, which several readers may share, not even a copy."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape)
    return torch.stack(list(tensors))


def by_shape(readers: Sequence[Stackable]) -> list[list[int]]:
    """Numbers of the readers that fit into one stack, in the order of the first of each."""
    groups: dict[object, list[int]] = {}
    for number, reader in enumerate(readers):
        shapes = tuple((name, tensor.shape) for name, tensor in reader.adapter_tensors())
        groups.setdefault(shapes, []).append(number)
    return list(groups.values())

"""Layout: how a family of published weight files names and shapes its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Tensors = Mapping[str, Tensor]
Shape = tuple[int, ...] | None  # of a tensor in the file; None: any shape
CLASSIFIER = r"(head|head_dist|fc|pre_logits)\."  # replaced by the tuned model's own head


def same_name(name: str) -> tuple[str, ...]:
    return (name,)


def same_shape(name: str, shape: tuple[int, ...], heads: int) -> list[Shape]:
    return [shape]


def same_value(name: str, found: list[Tensor]) -> Tensor:
    return found[0]


@dataclass(frozen=True)
class Layout:
    """A family of weight files."""

    title: str  # for people
    family: str  # of the models that it fits: "vit" or "swin"
    left_out: str  # pattern of the names in the file that are left out on purpose
    sources: Callable[[str], tuple[str, ...]] = same_name  # a tensor of the model -> tensors of the file
    shapes: Callable[[str, tuple[int, ...], int], list[Shape]] = same_shape  # theirs, from the model's, and its heads
    value: Callable[[str, list[Tensor]], Tensor] = same_value  # the model's tensor, made of the file's
    antialias: bool = True  # whether positions are resampled as in timm (bicubic) or as in JAX (bilinear)

"""The layers of a timm model, counted as timm counts them."""

from collections.abc import Iterable, Iterator
from typing import Any

from timm.models import group_parameters
from torch import nn

from dist_vpt.backbones.vit import Backbone


def layer_numbers(backbone: Backbone, names: Iterable[str]) -> dict[str, int]:
    """The layer of each of the backbone's tensors, of the head's, and of ``names``, all named as in timm.

    timm's layers (``group_matcher``) are the stem, 0; each block, the last one with the final norm; and the head with
    all that comes after the norm.
    """
    known = [backbone.timm_name(name) for name, _ in backbone.named_parameters()]
    return group_parameters(_Names([*known, *names, "head.weight"]), backbone.group_matcher, reverse=True)


class _Names(nn.Module):
    """Names of parameters for timm, which groups those of a module, and looks at nothing else of them."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.names = dict.fromkeys(names)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, nn.Parameter()) for name in self.names)

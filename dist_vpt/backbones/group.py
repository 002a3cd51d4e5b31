"""Several frozen backbones that readers read together.

D width, K backbones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError


class BackboneGroup(Backbone):
    """K backbones, each of which gets images of its own preprocessing. It is never called: its members are.

    Its width is the sum of theirs, since pooled features are concatenated, and its blocks are all of theirs.
    """

    def __init__(self, members: Sequence[Backbone]):
        nn.Module.__init__(self)
        self.parts = nn.ModuleList(members)
        self.width = sum(member.width for member in members)
        self.stochastic = False
        self.chosen = {}
        self.reporters = []
        for member in members:
            member.reporters = self.reporters
        self.train(False)

    @property
    def members(self) -> list[Backbone]:
        return list(self.parts)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        """All blocks, backbone by backbone."""
        return [block for member in self.members for block in member.blocks]

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether blocks of one of them are compiled."""
        return any(member.compiled for member in self.members)

    @property
    def dtype(self) -> torch.dtype:
        return self.members[0].dtype

    def collect_chosen(self) -> None:
        """Take over what kernels and policies chose: once where all members have the same, else of each."""
        for name in dict.fromkeys(name for member in self.members for name in member.chosen):
            found = [member.chosen.get(name, "none") for member in self.members]
            self.chosen[name] = found[0] if len(set(found)) == 1 else ", ".join(found)


@contextmanager
def naming_part(backbone: Backbone, number: int) -> Iterator[None]:
    """Say in a UserError which part of a group it is about, by its place in the recipe. ``number``: from 0."""
    try:
        yield
    except UserError as error:
        if len(backbone.members) > 1:
            error.args = (f"backbones[{number}]: {error}",)
        raise

"""Features of every block, of one backbone or of several, for a linear head.

B batch, N tokens, D width, L blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.stacked_layers import standardize_tokens


def count_block_features(backbone: Backbone, blocks: int) -> int:
    """Number of features that ``block_features`` gives for this many blocks of one backbone."""
    return backbone.width * (1 + blocks * (1 + _has_class_token(backbone)))


@torch.no_grad()
def block_features(
    backbone: Backbone, stream: StreamOutput, states: Sequence[Sequence[Tensor]], dtype: torch.dtype
) -> Tensor:
    """The pooled features, and of each block the mean patch and, if there is one, the class token, [B, F].

    ``states``: of each backbone the blocks' outputs [B, N, D], of which each token is brought to mean 0 and deviation
    1, so that none counts more than the others whatever its scale.
    """
    groups = [stream.pooled.to(dtype)]
    for member, of_member in zip(backbone.members, states, strict=True):
        for state_BND in of_member:
            tokens_BND = standardize_tokens(state_BND.to(dtype))
            groups.append(tokens_BND[:, member.prefix :].mean(1))
            if _has_class_token(member):
                groups.append(tokens_BND[:, 0])
    return torch.cat(groups, dim=1)


def _has_class_token(backbone: Backbone) -> bool:
    """Whether the first of the prefix tokens is a class token."""
    return getattr(backbone.stem, "cls_token", None) is not None

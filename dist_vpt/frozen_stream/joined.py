"""The frozen streams of several backbones as one.

B images, D sum of the backbones' widths.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.joined import Joined
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream


def stream_of(backbone: Backbone, images: Any, specs: Sequence[StreamSpec]) -> StreamOutput:
    """The stream that readers read: as it comes out of a cache, or computed from images [B, 3, S, S] (uint8).

    ``images``: a tensor or a stream, or for several backbones ``Joined`` ones. ``specs``: of each backbone.
    """
    if isinstance(images, StreamOutput):
        return images
    if not isinstance(images, Joined):
        return compute_stream(backbone, images, specs[0])
    found = [
        part if isinstance(part, StreamOutput) else compute_stream(member, part, spec)
        for member, part, spec in zip(backbone.members, images.parts, specs, strict=True)
    ]
    return join_streams(found)


def join_streams(found: Sequence[StreamOutput]) -> StreamOutput:
    """Pooled features concatenated, [B, D]; then the states of the first backbone, of the second, and so on."""
    dtype = found[0].pooled.dtype
    pooled_BD = torch.cat([each.pooled.to(dtype) for each in found], dim=1)
    return StreamOutput(pooled_BD, states=tuple(state for each in found for state in each.states))

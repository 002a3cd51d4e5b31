"""Swin Transformers in PyTorch, as published and as timm saves them."""

import re

from dist_vpt.backbones.weights.layouts.base import Layout

BUFFERS = r".*\.(attn_mask|relative_position_index)$"  # which the model computes itself


def _sources(name: str) -> tuple[str, ...]:
    """The published files merge patches at the end of a stage, timm at the start of the next."""
    return (re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name),)


SWIN = Layout("Swin Transformer, PyTorch", "swin", rf"head\.|{BUFFERS}", _sources)
SWIN_TIMM = Layout("Swin Transformer, PyTorch with timm's names", "swin", rf"head\.|{BUFFERS}")

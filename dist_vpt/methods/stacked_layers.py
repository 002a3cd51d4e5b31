"""Layers of small networks that are trained for T readers at once, each with its own weights.

T readers, B images, N tokens, I and O numbers before and after a layer, W width, H heads; X any dimensions between.

The weights of all readers come as one tensor a kind ([T, O, I], as ReaderStack holds them), and one product serves all
of them. A reader alone is a stack of one, so that both compute the same.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.blocks import widened
from dist_vpt.methods.stack import ReaderStack, Sources

Weights = Mapping[str, Tensor]


class Layer(nn.Module):
    """The weights of a pre-norm transformer block: x' = x + attention(norm1(x)), then x' + mlp(norm2(x'))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=width**-0.5 / 2)
            nn.init.zeros_(linear.bias)


class LowRankAttention(nn.Module):
    """The weights of attention of rank r between tokens of width W, without an MLP; it starts as 0."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.trunc_normal_(self.qkv.weight, std=width**-0.5)
        nn.init.zeros_(self.up.weight)


@dataclass(frozen=True)
class Dropout:
    """Each reader's rate, and its own source of random numbers, or None for torch's default one."""

    rates: Sequence[float]
    sources: Sequence[torch.Generator | None]

    @classmethod
    def of(cls, stack: ReaderStack, sources: Sources) -> "Dropout":
        """At the readers' own ``method.dropout``. ``sources``: as ``Reader.read_stacks`` gets them for a stack."""
        readers: Sequence[Any] = stack.readers
        rates = [reader.recipe.dropout if reader.training else 0.0 for reader in readers]
        return cls(rates, [None] * len(rates) if sources is None else [source.generator for source in sources])

    def __call__(self, x_TX: Tensor) -> Tensor:
        if not any(self.rates):
            return x_TX
        factors = []
        for row_X, rate, source in zip(x_TX, self.rates, self.sources, strict=True):
            if not rate:
                factors.append(row_X.new_ones(()).expand_as(row_X))
                continue
            kept_X = torch.rand(row_X.shape, generator=source, device=row_X.device) >= rate
            factors.append(kept_X.to(row_X.dtype) / (1 - rate))
        return x_TX * torch.stack(factors)


def standardize_tokens(x_BNW: Tensor) -> Tensor:
    """Each token with mean 0 and deviation 1, whatever its scale."""
    return F.layer_norm(x_BNW, x_BNW.shape[-1:], eps=1e-12)


def linear(x_TXI: Tensor, weights: Weights, name: str) -> Tensor:
    """[T, ..., O]."""
    weight_TOI, bias_TO = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    flat_TXI = x_TXI.flatten(1, -2)
    if bias_TO is None:
        flat_TXO = torch.bmm(flat_TXI, weight_TOI.transpose(1, 2))
    else:
        flat_TXO = torch.baddbmm(bias_TO.unsqueeze(1), flat_TXI, weight_TOI.transpose(1, 2))
    return flat_TXO.unflatten(1, x_TXI.shape[1:-1])


def shared_linear(x_BNI: Tensor, weights: Weights, name: str) -> Tensor:
    """Of equal inputs for all readers, in one product: [T, B, N, O]."""
    weight_TOI, bias_TO = weights[f"{name}.weight"], weights[f"{name}.bias"]
    output_BNX = F.linear(x_BNI, weight_TOI.flatten(0, 1), bias_TO.flatten())
    return output_BNX.unflatten(2, bias_TO.shape).permute(2, 0, 1, 3)


def layer_norm(x_TXW: Tensor, weights: Weights, name: str) -> Tensor:
    """Tokens of mean 0 and deviation 1, times a weight and plus a bias [T, W]; float32 whatever comes in."""
    ones = (len(x_TXW), *[1] * (x_TXW.ndim - 2), -1)
    normed_TXW = F.layer_norm(x_TXW, x_TXW.shape[-1:])
    return torch.addcmul(weights[f"{name}.bias"].view(ones), normed_TXW, weights[f"{name}.weight"].view(ones))


def attention(qkv_TBNX: Tensor, heads: int) -> Tensor:
    """Heads' outputs, concatenated, [T, B, N, W], for queries, keys and values, concatenated, X = 3 W."""
    slow = qkv_TBNX.device.type == "cpu"  # in half precision: four times slower backward than in float32
    with torch.autocast(qkv_TBNX.device.type, enabled=False) if slow else nullcontext():
        qkv = widened(qkv_TBNX) if slow else qkv_TBNX
        q, k, v = qkv.flatten(0, 1).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        heads_YHNE = F.scaled_dot_product_attention(q, k, v)
    return heads_YHNE.transpose(1, 2).flatten(2).unflatten(0, qkv_TBNX.shape[:2])


def transformer_layer(x_TBNW: Tensor, weights: Weights, name: str, heads: int, dropout: Dropout) -> Tensor:
    """A ``Layer``, with dropout after each of its two branches."""
    qkv = linear(layer_norm(x_TBNW, weights, f"{name}.norm1"), weights, f"{name}.qkv")
    attended_TBNW = attention(qkv, heads)
    x_TBNW = x_TBNW + dropout(linear(attended_TBNW, weights, f"{name}.proj"))
    hidden = F.gelu(linear(layer_norm(x_TBNW, weights, f"{name}.norm2"), weights, f"{name}.fc1"))
    return x_TBNW + dropout(linear(hidden, weights, f"{name}.fc2"))


def low_rank_attention(x_TBNW: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """A ``LowRankAttention``, without a residual."""
    qkv = linear(layer_norm(x_TBNW, weights, f"{name}.norm"), weights, f"{name}.qkv")
    return linear(attention(qkv, heads), weights, f"{name}.up")

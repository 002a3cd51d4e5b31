"""A frozen stream that keeps the sum of the blocks' outputs in place of each."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_vpt.frozen_stream.cache import layout, nbytes
from dist_vpt.frozen_stream.observe import StreamSpec, compute_stream
from dist_vpt.frozen_stream.placement import step_bytes
from tests.methods.conftest import make_backbone

EACH = StreamSpec(states=(1, 2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def sums(images: Tensor, spec: StreamSpec, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The sum that a backbone gives, and each of its states."""
    backbone = make_backbone("registers").hold_in(dtype)
    (found,) = compute_stream(backbone, images, replace(spec, summed=True)).states
    return found, list(compute_stream(backbone, images, spec).states)


@pytest.mark.parametrize("spec", [EACH, StreamSpec(states=(0, 2), patches_only=True), StreamSpec(states=(3,))])
def test_each_token_is_standardized_before_it_is_added(spec: StreamSpec, images: Tensor) -> None:
    found, states = sums(images, spec, torch.float32)
    units = [(s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True, correction=0) for s in map(Tensor.double, states)]
    torch.testing.assert_close(found.double(), sum(units), rtol=1e-4, atol=1e-5)


def test_half_precision_is_added_in_float32(images: Tensor) -> None:
    """Rounded once, at the end."""
    found, states = sums(images, EACH, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    units = [F.layer_norm(state.float(), state.shape[-1:], eps=1e-12) for state in states]
    assert torch.equal(found, (units[0] + units[1] + units[2]).bfloat16())


def test_states_are_left_as_they_are(images: Tensor) -> None:
    """What is added up is a copy: the pooled features and the other tensors are those without a sum."""
    backbone = make_backbone()
    both = replace(EACH, blocks=(0, 2), states=(0, 1, 2, 3))
    alone, summed = (compute_stream(backbone, images, spec) for spec in (both, replace(both, summed=True)))
    assert torch.equal(alone.pooled, summed.pooled)
    assert all(map(torch.equal, alone.normed, summed.normed))


@pytest.mark.parametrize("dtype", ["precision", "int8"])
def test_a_cache_of_a_sum_is_one_map(dtype: str, images: Tensor) -> None:
    backbone = make_backbone()
    each = replace(EACH, dtype=dtype)
    summed, pooled = replace(each, summed=True), nbytes(backbone, StreamSpec(), 7)
    assert 3 * (nbytes(backbone, summed, 7) - pooled) == nbytes(backbone, each, 7) - pooled
    scale = {"states-01-scale"} if dtype == "int8" else set()
    assert layout(backbone, summed, 7).keys() == {"pooled", "states-01"} | scale
    assert step_bytes(backbone, summed, 7) == step_bytes(backbone, each, 7)
    assert compute_stream(backbone, images, summed).states[0].shape == (len(images), backbone.tokens, backbone.width)

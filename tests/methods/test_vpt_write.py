"""Prompts put among the tokens, against autograd's own concatenation: equal to the last bit.

B batch, N tokens, P prompts, D width.
"""

import pytest
import torch
from torch import Tensor

from dist_vpt.methods.vpt import VPT
from tests.methods.test_structure import make


def plain(tokens_BND: Tensor, prompts_PD: Tensor, prefix: int, present: int) -> Tensor:
    prompts_BPD = prompts_PD.expand(len(tokens_BND), -1, -1).to(tokens_BND.dtype)
    return torch.cat([tokens_BND[:, :prefix], prompts_BPD, tokens_BND[:, prefix + present :]], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("present", [0, 2, 3], ids=["none before", "fewer before", "as many before"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen before", "trained before"])
def test_equal_to_a_concatenation(trained: bool, present: int, dtype: torch.dtype) -> None:
    method = make({"name": "vpt", "prompts": 3})
    assert isinstance(method, VPT)
    method.eval()
    prefix, noise = method.backbone.prefix, torch.Generator().manual_seed(1)
    tokens_BND = torch.randn(4, prefix + present + 5, 8, generator=noise).to(dtype).requires_grad_(trained)
    prompts_PD = torch.randn(3, 8, generator=noise, requires_grad=True)
    gradient_BND = torch.randn(4, prefix + 8, 8, generator=noise).to(dtype)
    asked = (tokens_BND, prompts_PD) if trained else (prompts_PD,)
    before = tokens_BND.detach().clone()
    found, wanted = (
        write(tokens_BND, prompts_PD, *where)
        for write, where in ((method._write, (present,)), (plain, (prefix, present)))
    )
    assert torch.equal(found, wanted)
    assert torch.equal(tokens_BND, before)  # a compiled block may keep its output
    for a, b in zip(*(torch.autograd.grad(out, asked, gradient_BND) for out in (found, wanted)), strict=True):
        assert torch.equal(a, b)

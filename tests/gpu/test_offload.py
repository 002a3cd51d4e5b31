"""runtime.offload on a GPU: the same numbers, less memory, and copies beside what is computed."""

import pytest
import torch

from dist_vpt.runtime.offload import apply_offload
from tests.runtime.test_policies import IMAGES, make, numbers

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("policy", ["none", "block", "budget-0.5"])
def test_equal_numbers(policy: str) -> None:
    plain, offloaded = make(policy).cuda(), make(policy).cuda()
    apply_offload(offloaded.backbone)
    images = IMAGES.cuda()
    for _ in range(3):  # memory is reused from the second on
        for method in (plain, offloaded):
            method.zero_grad()
            method(images).square().sum().backward()
        for (name, a), (_, b) in zip(plain.trainable(), offloaded.trainable(), strict=True):
            assert a.grad is not None
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]
    assert len(numbers(make(policy))) > 0


def test_less_is_on_the_device_between_forward_and_backward() -> None:
    held = []
    images = IMAGES.cuda().repeat(64, 1, 1, 1)
    for offload in (False, True):
        method = make("none").cuda()
        if offload:
            apply_offload(method.backbone)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = method(images).square().sum()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    assert held[1] < 0.5 * held[0]

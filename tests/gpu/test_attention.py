"""runtime.attention on a GPU: kernels of a package are used where they run, and refused with its name elsewhere."""

import pytest
import torch
from torch.nn import attention

from dist_vpt.cli.doctor import check_flash
from dist_vpt.errors import UserError
from dist_vpt.runtime.attention import AttentionScores, activate_flash, refuse_missing, restore_flash

pytestmark = pytest.mark.gpu
SCORES = {AttentionScores(64), AttentionScores(80)}


def test_flash_runs_or_is_refused_with_the_capability() -> None:
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    name, refused = None, ""
    try:
        name = activate_flash(torch.bfloat16, SCORES, cpu=False)
    except UserError as error:
        refused = str(error)
    assert attention.current_flash_attention_impl() == name
    restore_flash()
    assert attention.current_flash_attention_impl() is None
    if name is None:
        assert f"(compute capability {capability})" in refused
    else:
        assert name != "FA4" or capability.startswith(("9.", "10."))
        assert f"flash is {name}" in check_flash().found


@pytest.mark.parametrize("kernel", ["sdpa_flash", "sdpa_efficient"])
def test_torch_s_own_kernels_are_there_in_half_precision(kernel: str) -> None:
    refuse_missing(kernel, torch.bfloat16, False, SCORES)


def test_flash_in_float32_is_refused() -> None:
    with pytest.raises(UserError, match=r"sdpa_flash: there is no such kernel for .* \(compute capability .*float32"):
        refuse_missing("sdpa_flash", torch.float32, False, {AttentionScores(64)})

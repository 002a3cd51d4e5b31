"""The parts of an optimizer step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_vpt.training.step import clip_gradients, fold_in, image_losses, not_finite, snapshot, squared_norms, weigh


def parameters(seed: int) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2,))]
    for parameter in made[:2]:  # the last one has no gradient
        parameter.grad = torch.randn_like(parameter)
    return made


def test_seeds_of_neighboring_steps_differ() -> None:
    seeds = {fold_in(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_losses_of_many_trials_are_those_of_each() -> None:
    logits_TBK, labels_B = torch.randn(3, 7, 5), torch.randint(0, 5, (7,))
    losses_TB = image_losses(logits_TBK, labels_B, 0.1)
    for logits_BK, losses_B in zip(logits_TBK, losses_TB, strict=True):
        assert torch.equal(losses_B, image_losses(logits_BK, labels_B, 0.1))
        assert torch.equal(losses_B, F.cross_entropy(logits_BK, labels_B, reduction="none", label_smoothing=0.1))


def test_weights_are_of_the_class_and_of_the_image() -> None:
    batch = {"labels": torch.tensor([0, 1, 1]), "weight": torch.tensor([1.0, 1.0, 0.0])}
    assert weigh(batch, torch.tensor([2.0, 3.0])).tolist() == [2, 3, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_groups_are_clipped_as_torch_clips_each(clip_norm: float) -> None:
    groups, alone = ([parameters(seed) for seed in (0, 1)] for _ in range(2))
    norms = clip_gradients(groups, clip_norm)
    for norm, group, expected in zip(norms, groups, alone, strict=True):
        assert torch.equal(norm, nn.utils.clip_grad_norm_(expected, clip_norm))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(group[:2], expected[:2], strict=True))


def test_without_a_limit_norms_are_measured_alone() -> None:
    group, unchanged = parameters(0), parameters(0)
    assert float(clip_gradients([group], None)[0]) == pytest.approx(
        math.sqrt(sum(float((p.grad**2).sum()) for p in unchanged[:2]))
    )
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(group[:2], unchanged[:2], strict=True))


def test_values_that_are_not_finite_are_reported_with_their_step() -> None:
    assert not_finite("loss", 1.5, 3) == ""
    assert not_finite("loss", math.nan, 3) == "the loss is nan at step 3"
    assert not_finite("gradient norm", math.inf, 0) == "the gradient norm is inf at step 0"


def test_norms_of_parameters_and_of_their_update() -> None:
    group = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([4.0]))]
    before = snapshot(group)
    with torch.no_grad():
        group[0] += 2
    assert squared_norms(before, snapshot(group)).tolist() == [25 + 16, 4]

"""Balanced sampling: which images an epoch draws, and that batches are the same however they are made."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from dist_vpt.data.loaders import TrainBatches
from dist_vpt.data.sampling import balanced, earlier_draws, epoch_order
from dist_vpt.data.splits import ArraySource, Split, shuffled
from dist_vpt.data.transforms import ImageTransform

COUNTS = (3, 40, 1, 17)  # images of a class; a class without any lies between
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], COUNTS)).astype(np.int64)
N = len(LABELS)
DRAWN = ImageTransform(16, "bilinear", "crop", "fgvc")


def split() -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (N, 20, 30, 3), dtype=np.uint8)
    return Split("train", LABELS, ArraySource(pixels, "noise"))


def test_it_is_a_pinned_function_of_its_key() -> None:
    labels = np.array([0, 0, 0, 1])
    assert balanced(labels, 0, 0).tolist() == [3, 3, 0, 3]
    assert np.array_equal(balanced(LABELS, 1, 2), balanced(LABELS, 1, 2))
    others = [balanced(LABELS, *key) for key in ((1, 3), (2, 2), (1, 2))]
    assert not np.array_equal(others[0], others[2])
    assert not np.array_equal(others[1], others[2])


def test_classes_are_drawn_alike_and_images_alike_in_them() -> None:
    """Counts over 2,000 epochs lie within 4.5 standard deviations of a multinomial's, as those of torch's sampler."""
    epochs = 2000
    ours = np.zeros(N)
    for epoch in range(epochs):
        order = balanced(LABELS, 7, epoch)
        assert order.shape == (N,)
        ours += np.bincount(order, minlength=N)
    weights = 1 / np.bincount(LABELS)[LABELS]
    generator = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(weights.tolist(), epochs * N, generator=generator)
    theirs = np.bincount(np.array(list(sampler)), minlength=N)
    p = weights / weights.sum()
    for counts in (ours, theirs):
        assert counts.sum() == epochs * N
        deviations = (counts - epochs * N * p) / np.sqrt(epochs * N * p * (1 - p))
        assert abs(deviations).max() < 4.5
        of_class = np.bincount(LABELS, counts)[[0, 1, 3, 4]] / (epochs * N)
        assert abs(of_class - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / (epochs * N))


def test_draws_are_independent_of_each_other() -> None:
    """Of neighboring draws all pairs of classes are equally frequent, within an epoch and between epochs."""
    pairs: np.ndarray = np.zeros((2, 5, 5))
    for epoch in range(1000):
        classes, following = (LABELS[balanced(LABELS, 3, each)] for each in (epoch, epoch + 1))
        np.add.at(pairs[0], (classes[:-1], classes[1:]), 1)
        np.add.at(pairs[1], (classes, following), 1)
    for counts in pairs[:, [0, 1, 3, 4]][:, :, [0, 1, 3, 4]]:
        expected = counts.sum() / 16
        assert ((counts - expected) ** 2 / expected).sum() < 45  # chi squared with 15 degrees of freedom: p = 1e-4


def test_earlier_draws() -> None:
    order = np.array([4, 2, 4, 4, 0, 2])
    assert earlier_draws(order).tolist() == [0, 0, 1, 2, 0, 1]
    assert earlier_draws(np.array([], np.int64)).tolist() == []
    order = balanced(LABELS, 0)
    assert earlier_draws(order).tolist() == [int((order[:k] == order[k]).sum()) for k in range(N)]


def test_shuffle_shows_each_image_once() -> None:
    assert np.array_equal(epoch_order("shuffle", split(), 5, 2), shuffled(N, 5, 2))


Position = tuple[int, int, bytes]  # image, label, pixels


def steps(
    world: int = 1, accumulate: int = 1, start: int = 0, device: bool = False, **keys: Any
) -> list[list[Position]]:
    """The images of each global step in the order of the epoch."""
    ranks = []
    for rank in range(world):
        batches = TrainBatches(
            split(), DRAWN, batch_size=12, accumulate=accumulate, rank=rank, world=world, seed=7, sampling="balanced",
            **keys,
        )  # fmt: skip
        if device:
            batches.keep_on(torch.device("cpu"), 1e9)
        ranks.append(list(batches.epoch(3, start)))
        assert len(ranks[-1]) == len(batches) - start == -(-N // 12) - start
        batches.close()
    found = []
    for step in zip(*ranks, strict=True):
        of_step: list[Position] = []
        micro_batches = [step[rank][micro] for micro in range(accumulate) for rank in range(world)]
        for place in range(max(len(batch["index"]) for batch in micro_batches)):
            for batch in micro_batches:
                index = int(batch["index"][place])
                assert float(batch["weight"][place]) == (index != -1)
                if index != -1:
                    of_step.append((index, int(batch["labels"][place]), batch["images"][place].numpy().tobytes()))
        found.append(of_step)
    return found


@pytest.fixture(scope="module")
def one_process() -> list[list[Position]]:
    return steps()


def test_a_pass_is_the_order(one_process: list[list[Position]]) -> None:
    order = balanced(LABELS, 7, 3)
    assert [index for step in one_process for index, _, _ in step] == order.tolist()
    assert [label for step in one_process for _, label, _ in step] == LABELS[order].tolist()


@pytest.mark.parametrize(
    "layout",
    [
        {"world": 2},
        {"accumulate": 3},
        {"world": 2, "accumulate": 3},
        {"world": 4, "cache": "memory"},
        {"cache": "memory"},
        {"device": True, "cache": "memory", "world": 2},
        {"workers": 2, "accumulate": 2},
        {"same_size": True},
    ],
    ids=str,
)
def test_batches_do_not_depend_on_the_layout(layout: dict[str, Any], one_process: list[list[Position]]) -> None:
    assert steps(**layout) == one_process


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_resumed_epoch_goes_on_where_it_stopped(start: int, one_process: list[list[Position]]) -> None:
    assert steps(start=start) == one_process[start:]


def test_an_image_that_comes_again_is_cut_and_flipped_anew(one_process: list[list[Position]]) -> None:
    every = [position for step in one_process for position in step]
    [only] = np.flatnonzero(LABELS == 3)  # about a quarter of all
    crops = [pixels for index, _, pixels in every if index == only]
    assert len(crops) > 8
    assert len(set(crops)) > len(crops) / 2
    first = next(k for k, (index, _, _) in enumerate(every) if index == only)
    picture = split().read(int(only))
    assert every[first][2] == DRAWN.train(picture, 7, 3, int(only)).numpy().tobytes()  # as without repeats

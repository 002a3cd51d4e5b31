"""Mixup, CutMix, random erasing and RandAugment: timm's own values, and pure functions of what seeds them."""

import contextlib
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from dist_vpt.data.augmentation import BatchAugmentation
from dist_vpt.data.loaders import TrainBatches
from dist_vpt.data.rand_augment import ERASING, MIXING, RAND_AUGMENT, rand_augmented, seeded
from dist_vpt.data.splits import ArraySource, Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.data.workers import PADDING, Batch
from dist_vpt.errors import UserError
from dist_vpt.training.step import for_each_label, image_losses, weigh

CLASSES, SIDE = 5, 16
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1) * 255, torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1) * 255
MIXES = [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]


def augmentation(**changes: Any) -> BatchAugmentation:
    off: dict[str, Any] = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "prob": 1.0, "switch_prob": 0.5, "erasing": 0.0,
                           "erasing_mode": "pixel", "seed": 7, "mean": MEAN, "std": STD}  # fmt: skip
    return BatchAugmentation(**off | changes)


def batch(images: int, *, absent: tuple[int, ...] = ()) -> Batch:
    draw = torch.Generator().manual_seed(3)
    weight = torch.ones(images)
    weight[list(absent)] = 0
    return {
        "images": torch.randint(0, 256, (images, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8),
        "labels": torch.randint(0, CLASSES, (images,), generator=draw),
        "weight": weight,
        "index": torch.arange(100, 100 + images),
    }


def augmented(made: BatchAugmentation, given: Batch, epoch: int = 2, step: int = 4) -> Batch:
    return made(given, given["index"], epoch, step)


def loss_of(logits_BK: Tensor, mixed: Batch, class_weights_K: Tensor, smoothing: float) -> Tensor:
    """As the engine computes it."""
    weights = weigh(mixed, class_weights_K)
    losses = image_losses(for_each_label(logits_BK, mixed["labels"]), mixed["labels"], smoothing)
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), MIXES)
def test_images_and_losses_are_those_of_timm(mixup_alpha: float, cutmix_alpha: float, smoothing: float) -> None:
    given, kinds = batch(6), set()
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    for step in range(12):
        ours = augmented(augmentation(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha), given, step=step)
        timms = Mixup(mixup_alpha, cutmix_alpha, label_smoothing=smoothing, num_classes=CLASSES)
        with seeded(7, 2, step, MIXING):
            images, targets = timms(given["images"].float(), given["labels"])
        assert torch.equal(ours["images"], images)
        expected = SoftTargetCrossEntropy()(logits, targets)
        found = loss_of(logits, ours, torch.ones(CLASSES), smoothing)
        assert torch.allclose(found, expected, rtol=1e-5)
        assert ours["weight"].sum() == pytest.approx(6)
        kinds.add(bool((images == images.round()).all()))  # CutMix mixes no pixels
    assert len(kinds) == (2 if mixup_alpha and cutmix_alpha else 1)


def test_a_share_of_the_batches_is_mixed() -> None:
    given = batch(4)
    made = augmentation(mixup_alpha=1.0, prob=0.3)
    plain = sum(
        torch.equal(augmented(made, given, step=step)["images"], given["images"].float()) for step in range(200)
    )
    assert 120 <= plain <= 160
    unmixed = next(
        found
        for step in range(20)
        if torch.equal((found := augmented(made, given, step=step))["images"], given["images"].float())
    )
    assert unmixed["weight"].tolist() == [1] * 4 + [0] * 4


def test_class_weights_are_those_of_both_labels() -> None:
    given = batch(6)
    class_weights_K = torch.tensor([0.2, 0.5, 1.0, 2.0, 4.0])
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    mixed = augmented(augmentation(mixup_alpha=0.8), given)
    share, labels = float(mixed["weight"][0]), given["labels"].tolist()
    log_p = F.log_softmax(logits.double(), 1)
    total = weight = 0.0
    for b in range(6):
        for label, part in ((labels[b], share), (labels[5 - b], 1 - share)):
            total -= float(part * class_weights_K[label] * log_p[b, label])
            weight += float(part * class_weights_K[label])
    assert float(loss_of(logits, mixed, class_weights_K, 0.0)) == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), MIXES[:2])
def test_an_image_beside_padding_or_a_skipped_one_stays_as_it_is(mixup_alpha: float, cutmix_alpha: float) -> None:
    given = batch(6, absent=(4, 5))
    mixed = augmented(augmentation(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha), given)
    assert torch.equal(mixed["images"][:2], given["images"][:2].float())
    assert not torch.equal(mixed["images"][2], given["images"][2].float())
    own, partners = mixed["weight"].unflatten(0, (2, 6)).tolist()
    assert own[:2] == [1, 1]
    assert partners[:2] == [0, 0]
    assert own[4:] == partners[4:] == [0, 0]
    assert 0 < own[2] < 1
    assert own[2] + partners[2] == pytest.approx(1)


@pytest.mark.parametrize("images", [12, 11, 7, 1])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_pairs_are_the_same_however_a_batch_is_split(world: int, accumulate: int, images: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 8, 8, 3), np.uint8)
    split = Split("train", np.arange(images) % CLASSES, ArraySource(pixels, "mine"))
    made = augmentation(cutmix_alpha=1.0, erasing=0.5)

    def shown(world: int, accumulate: int) -> dict[int, tuple[Tensor, list[float]]]:
        found = {}
        for rank in range(world):
            options: dict[str, Any] = {"batch_size": 12, "accumulate": accumulate, "rank": rank, "world": world}
            loader = TrainBatches(split, ImageTransform(8, "bilinear"), **options, seed=3, pairs=True)
            (micro_batches,) = loader.epoch(1)
            for each in micro_batches:
                mixed = made(each, each["index"], 1, 0)
                weights = mixed["weight"].unflatten(0, (2, -1)).T.tolist()
                labels = mixed["labels"].unflatten(0, (2, -1)).T.tolist()
                for b, i in enumerate(each["index"].tolist()):
                    if i != PADDING:
                        found[i] = mixed["images"][b], [*weights[b], *labels[b][: 1 + (weights[b][1] > 0)]]
        return found

    one, other = shown(1, 1), shown(world, accumulate)
    assert one.keys() == other.keys() == set(range(images))
    for i, (image, numbers) in one.items():
        assert torch.equal(other[i][0], image)
        assert other[i][1] == numbers


def test_whole_batches_in_pairs_are_in_the_usual_order() -> None:
    split = Split("train", np.zeros(8, np.int64), ArraySource(np.zeros((8, 8, 8, 3), np.uint8), "mine"))
    plain, pairs = (
        next(TrainBatches(split, ImageTransform(8, "bilinear"), batch_size=8, pairs=pairs).epoch(0))[0]["index"]
        for pairs in (False, True)
    )
    assert torch.equal(plain, pairs)


def test_a_batch_size_without_whole_pairs_is_refused() -> None:
    split = Split("train", np.zeros(8, np.int64), ArraySource(np.zeros((8, 8, 8, 3), np.uint8), "mine"))
    with pytest.raises(UserError) as refused:
        TrainBatches(split, ImageTransform(8, "bilinear"), batch_size=6, world=2, pairs=True)
    assert str(refused.value) == (
        "batch_size 6: must be a multiple of 4 = 2 processes x 1 accumulated micro-batches x 2 images of a pair "
        "(mixup); use 4 or 8"
    )


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_boxes_are_erased_as_by_timm(mode: Any) -> None:
    given = batch(8)
    found = augmented(augmentation(erasing=0.6, erasing_mode=mode), given)
    erased = 0
    for b, i in enumerate(given["index"].tolist()):
        normalized = ((given["images"][b : b + 1] - MEAN) / STD)[0]
        expected = normalized.clone()
        with seeded(7, 2, i, ERASING) as seed:
            torch.manual_seed(seed)
            RandomErasing(0.6, mode=mode, device="cpu")(expected)
        assert torch.allclose((found["images"][b : b + 1] - MEAN) / STD, expected, atol=1e-5)
        outside = expected == normalized
        assert torch.equal(found["images"][b][outside], given["images"][b][outside].float())
        erased += int(not outside.all())
    assert 2 <= erased <= 7
    alone = {**given, "images": given["images"][3:4], "index": given["index"][3:4]}
    again = augmented(augmentation(erasing=0.6, erasing_mode=mode), alone, step=9)  # type: ignore[arg-type]
    assert torch.equal(again["images"], found["images"][3:4])
    assert not torch.equal(augmented(augmentation(erasing=1.0), given)["images"],
                           augmented(augmentation(erasing=1.0), given, epoch=3)["images"])  # fmt: skip


def test_mixed_images_are_erased_after_that() -> None:
    given = batch(4)
    mixed = augmented(augmentation(mixup_alpha=1.0), given)
    both = augmented(augmentation(mixup_alpha=1.0, erasing=1.0, erasing_mode="const"), given)
    same = both["images"] == mixed["images"]
    assert 0.5 < same.float().mean() < 1
    assert torch.equal(both["images"][~same], MEAN.expand(4, 3, SIDE, SIDE)[~same])
    assert torch.equal(both["labels"], mixed["labels"])


# --- RandAugment

POLICY = "rand-m9-n3-mstd0.5-inc1"


def picture(side: int = 32) -> np.ndarray:
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], (ramp[:, None] // 2 + ramp[None] // 2)), -1)


def test_an_image_is_augmented_as_by_timm_s_create_transform() -> None:
    from PIL import Image

    made = create_transform(32, is_training=True, auto_augment=POLICY, interpolation="random", mean=(0.4, 0.5, 0.6))
    (theirs,) = (each for each in made.transforms if isinstance(each, RandAugment))
    changed = compared = 0
    for i in range(20):
        with seeded(5, 1, i, RAND_AUGMENT), contextlib.suppress(ValueError):  # it keeps 0 bits of an image
            expected = np.asarray(theirs(Image.fromarray(picture())))
            compared += 1
        found = rand_augmented(picture(), POLICY, (0.4, 0.5, 0.6), 5, 1, i)
        assert found.dtype == np.uint8
        changed += int(not np.array_equal(found, picture()))
        assert np.array_equal(found, expected) or not found.any()
    assert changed > 10
    assert compared > 15


@pytest.mark.parametrize("policy", ["rand-m1-n9-p1", "rand-m12-n9-p1-mmax12-inc1"])
def test_an_image_of_no_bits_is_no_error(policy: str) -> None:
    """timm's posterize keeps none at its ends, which Pillow refuses."""
    found = [rand_augmented(picture(), policy, (0.5,) * 3, 0, 0, i) for i in range(40)]
    assert any(not image.any() for image in found)


def test_images_are_a_function_of_seed_epoch_and_image() -> None:
    transform = ImageTransform(32, "bilinear", rand_augment=POLICY)
    one = [transform.train(picture(), 1, 2, i) for i in range(8)]
    random.seed(99)
    np.random.seed(99)
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    again = [transform.train(picture(), 1, 2, i) for i in reversed(range(8))][::-1]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for other in ((2, 2), (1, 3)):
        assert any(not torch.equal(transform.train(picture(), *other, i), one[i]) for i in range(8))
    assert any(not torch.equal(one[0], each) for each in one)
    assert torch.equal(transform.eval(picture()), ImageTransform(32, "bilinear").eval(picture()))


def test_it_follows_crop_and_flip_and_a_vpt_resize() -> None:
    plain = ImageTransform(16, "bilinear", "crop", "fgvc")
    made = ImageTransform(16, "bilinear", "crop", "fgvc", rand_augment=POLICY)
    for i in range(4):
        cut = plain.train(picture(), 1, 2, i).numpy().transpose(1, 2, 0)
        expected = rand_augmented(np.ascontiguousarray(cut), POLICY, (0.5,) * 3, 1, 2, i)
        assert np.array_equal(made.train(picture(), 1, 2, i).numpy().transpose(1, 2, 0), expected)
    published = ImageTransform(16, "vpt", rand_augment=POLICY).train(picture(), 1, 2, 0)
    assert published.dtype == torch.float32
    assert published.shape == (3, 16, 16)


@pytest.mark.parametrize(("workers", "cache"), [(2, "none"), (0, "memory")])
def test_workers_and_a_cache_change_no_image(workers: int, cache: Any) -> None:
    pixels = np.stack([picture(16)] * 6)
    split = Split("train", np.zeros(6, np.int64), ArraySource(pixels, "mine"))
    transform = ImageTransform(16, "bilinear", rand_augment=POLICY)
    expected = [each["images"] for step in TrainBatches(split, transform, batch_size=3).epoch(1) for each in step]
    loader = TrainBatches(split, transform, batch_size=3, workers=workers, cache=cache)
    loader.keep_on(torch.device("cpu"), 1e9)
    found = [each["images"] for step in loader.epoch(1) for each in step]
    loader.close()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

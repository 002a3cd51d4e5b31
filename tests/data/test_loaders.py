"""Batches: the same global batches however they are made, and what is reported when they cannot be."""

import os
import signal
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vpt.data import transforms
from dist_vpt.data import workers as workers_module
from dist_vpt.data.images import decode
from dist_vpt.data.loaders import EvalBatches, TrainBatches
from dist_vpt.data.splits import ArraySource, Split, shuffled
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.errors import DataError, UserError

N, SEED, EPOCH = 53, 7, 3
PLAIN = ImageTransform(8, "bilinear", "squash")
AUGMENTED = ImageTransform(16, "bilinear", "crop", "fgvc")
PUBLISHED = ImageTransform(8, "vpt", "squash")


def make_split(n: int = N) -> Split:
    """Noise images; the label is a function of the place."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 20, 30, 3), dtype=np.uint8)
    return Split("train", np.arange(n, dtype=np.int64) % 5, ArraySource(pixels, "noise"))


def global_batches(world=1, accumulate=1, *, epoch=EPOCH, start_step=0, **settings):
    """For each step, {place in the split: (label, pixels)} over all processes and micro-batches."""
    ranks = []
    for rank in range(world):
        settings = {"seed": SEED, **settings}
        batches = TrainBatches(
            make_split(), AUGMENTED, batch_size=12, accumulate=accumulate, rank=rank, world=world, **settings
        )
        ranks.append(list(batches.epoch(epoch, start_step)))
        assert len(batches) == batches.steps_per_epoch == start_step + len(ranks[-1])
    merged = []
    for steps in zip(*ranks, strict=True):
        micro_batches = [batch for step in steps for batch in step]
        assert len(micro_batches) == world * accumulate
        assert len({batch["images"].shape for batch in micro_batches}) == 1
        assert sum(len(batch["index"]) for batch in micro_batches) < 12 + world * accumulate
        merged.append(content(micro_batches))
    return merged


def content(batches):
    """{place: (label, pixels)}; padding is checked to be empty, and no place to occur twice."""
    found = {}
    for batch in batches:
        assert batch["images"].dtype == torch.uint8
        assert (batch["labels"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
        assert batch["weight"].dtype == torch.float32
        for image, label, weight, index in zip(
            batch["images"], batch["labels"].tolist(), batch["weight"].tolist(), batch["index"].tolist(), strict=True
        ):
            if index == -1:
                assert (weight, label, int(image.sum())) == (0, 0, 0)
                continue
            assert weight == 1
            assert index not in found
            found[index] = (label, image.numpy().tobytes())
    return found


@pytest.fixture(scope="module")
def plain_pass():
    return global_batches()


def test_epoch_is_the_permutation_and_drops_nothing(plain_pass):
    order = shuffled(N, SEED, EPOCH)
    assert [set(step) for step in plain_pass] == [set(order[k : k + 12].tolist()) for k in range(0, N, 12)]
    assert [len(step) for step in plain_pass] == [12, 12, 12, 12, 5]


def test_images_and_labels_are_those_of_the_split(plain_pass):
    split = make_split()
    for step in plain_pass:
        for i, (label, pixels) in step.items():
            assert label == split.labels[i]
            assert pixels == AUGMENTED.train(split.read(i), SEED, EPOCH, i).numpy().tobytes()


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (2, 3), (4, 1), (4, 3), (1, 12)])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_global_batches_do_not_depend_on_the_layout(plain_pass, world, accumulate, cache):
    assert global_batches(world, accumulate, cache=cache) == plain_pass


def test_nor_on_workers_nor_on_where_they_start(plain_pass):
    assert global_batches(workers=2, accumulate=3, start_step=2) == plain_pass[2:]


@pytest.mark.parametrize("start_step", [1, 4, 5])
def test_resumed_epoch_goes_on_where_it_stopped(plain_pass, start_step):
    assert global_batches(start_step=start_step) == plain_pass[start_step:]


def test_order_and_crops_follow_seed_and_epoch(plain_pass):
    for other in (global_batches(epoch=EPOCH + 1), global_batches(seed=SEED + 1)):
        assert [list(step) for step in other] != [list(step) for step in plain_pass]
        first, second = ({i: x for step in steps for i, x in step.items()} for steps in (other, plain_pass))
        assert first.keys() == second.keys()
        assert sum(first[i] == second[i] for i in first) < N / 4


def test_padding_is_spread():
    """The last global batch of 5 over 4 processes: 2 places each, one or two of them real."""
    weights = []
    for rank in range(4):
        batches = TrainBatches(make_split(), PLAIN, batch_size=12, rank=rank, world=4)
        weights.append(list(batches.epoch(0))[-1][0]["weight"].tolist())
    assert sorted(map(sum, weights)) == [1, 1, 1, 2]


def test_batches_of_one_size():
    """Padding fills the last one, and the images and their order stay those of smaller last batches."""
    for parts in ({}, {"world": 2, "accumulate": 3}):
        made = []
        for same_size in (False, True):
            ranks = []
            for rank in range(parts.get("world", 1)):
                batches = TrainBatches(make_split(), PLAIN, batch_size=12, rank=rank, same_size=same_size, **parts)
                ranks.append(list(batches.epoch(EPOCH)))
            made.append([[batch for step in steps for batch in step] for steps in zip(*ranks, strict=True)])
        assert len({len(batch["index"]) for step in made[1] for batch in step}) == 1
        for plain, padded in zip(*made, strict=True):
            wanted, found = content(plain), content(padded)
            assert wanted.keys() == found.keys()
            assert all(np.array_equal(wanted[i][1], found[i][1]) for i in wanted)
    sizes = [len(b["index"]) for b in EvalBatches(make_split(), PLAIN, 10, rank=1, world=2, same_size=True)]
    assert sizes == [10, 10, 10]
    (small,) = EvalBatches(make_split(5), PLAIN, 10, same_size=True)  # no other batch to be like
    assert len(small["index"]) == 5


def test_batch_larger_than_the_split():
    (step,) = TrainBatches(make_split(5), PLAIN, batch_size=64, accumulate=2).epoch(0)
    assert [len(batch["index"]) for batch in step] == [3, 3]
    assert content(step).keys() == set(range(5))


@pytest.mark.parametrize(
    ("batch_size", "message"),
    [(13, "use 12 or 18"), (5, "use 6"), (0, "use 6"), (-6, "use 6"), (100, "use 96 or 102")],
)
def test_batch_size_must_divide(batch_size, message):
    rule = f"batch_size {batch_size}: must be a multiple of 6 = 2 processes x 3 accumulated micro-batches; {message}"
    with pytest.raises(UserError, match=rule):
        TrainBatches(make_split(), PLAIN, batch_size=batch_size, accumulate=3, world=2)


@pytest.mark.parametrize(("n", "world", "batch_size"), [(53, 1, 16), (53, 4, 4), (8, 4, 2), (3, 4, 2), (53, 3, 100)])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("local_world", [None, 1])  # how many of the processes share a machine changes nothing
def test_evaluation_sees_every_example_once(n, world, batch_size, cache, local_world):
    split, per_rank = make_split(n), []
    for rank in range(world):
        options = {"rank": rank, "world": world, "local_world": local_world, "cache": cache}
        batches = EvalBatches(split, AUGMENTED, batch_size, **options)
        per_rank.append(list(batches))
        assert len(per_rank[-1]) == len(batches) == -(-n // (world * batch_size))
    assert len({tuple(len(batch["index"]) for batch in batches) for batches in per_rank}) == 1
    found = content(batch for batches in per_rank for batch in batches)
    assert found.keys() == set(range(n))
    for i, (label, pixels) in found.items():
        assert label == split.labels[i]
        assert pixels == AUGMENTED.eval(split.read(i)).numpy().tobytes()


def test_evaluation_refuses_an_empty_batch():
    with pytest.raises(UserError, match="batch_size 0: must be at least 1"):
        EvalBatches(make_split(), PLAIN, 0)


def test_workers_stay_and_an_abandoned_pass_does_not_leak():
    batches = EvalBatches(make_split(), PLAIN, 4, workers=2)
    whole = content(batches)
    first = iter(batches)
    abandoned = [next(first) for _ in range(2)]
    assert content(batches) == whole
    assert content(abandoned).items() <= whole.items()
    started = time.monotonic()
    assert content(batches) == whole
    assert time.monotonic() - started < 1  # no process was started
    batches.close()
    assert content(batches) == whole


def test_a_pass_ended_by_a_later_one_raises():
    batches = TrainBatches(make_split(), PLAIN, batch_size=4)
    first = batches.epoch(0)
    next(first)
    next(batches.epoch(1))
    with pytest.raises(RuntimeError, match="a later pass over these batches was started"):
        next(first)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(TrainBatches(make_split(), AUGMENTED, batch_size=4).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@dataclass
class Files:
    """A source of image files, in which some reads can be made to go wrong."""

    paths: list[str]
    breaks: str = ""  # what the read of image 3 does

    def read(self, i: int, max_megapixels: float):
        if i == 3 and self.breaks == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 3 and self.breaks == "bug":
            raise ZeroDivisionError("a bug of ours")
        if self.breaks == "count":
            with open(self.paths[i] + ".reads", "a") as log:
                log.write("x")
        return decode(self.paths[i], self.paths[i], max_megapixels)

    def where(self, i: int) -> str:
        return self.paths[i]


@pytest.fixture
def files(tmp_path):
    """Eight JPEG files; bad() cuts number 3 short."""

    def make(breaks: str = "", bad: bool = False) -> Split:
        paths = [str(tmp_path / f"{i}.jpg") for i in range(8)]
        rng = np.random.default_rng(0)
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
        if bad:
            with open(paths[3], "r+b") as file:
                file.truncate(500)
        return Split("train", np.ones(8, np.int64), Files(paths, breaks))

    return make


@pytest.mark.parametrize(("workers", "cache"), [(0, "none"), (0, "memory"), (1, "none")])
def test_bad_image_is_named(files, workers, cache):
    split = files(bad=True)
    message = (
        r"3\.jpg: the image cannot be read \(OSError: .*[Tt]runcated.*\); replace the file, or set data\.on_decode"
    )
    train = TrainBatches(split, PLAIN, batch_size=4, workers=workers, cache=cache)
    with pytest.raises(DataError, match=message) as caught:
        list(train.epoch(0))
    assert "Traceback" not in str(caught.value)
    if workers == 0:
        with pytest.raises(DataError, match=message):
            list(EvalBatches(split, PLAIN, 4, cache=cache))


@pytest.mark.parametrize(("workers", "cache"), [(0, "none"), (0, "memory"), (1, "none")])
def test_bad_image_is_skipped_and_counted(files, workers, cache):
    split = files(bad=True)
    settings = {"workers": workers, "cache": cache, "on_decode_error": "skip"}
    train = TrainBatches(split, PLAIN, batch_size=4, **settings)
    assert train.skipped == set()
    for epoch in range(2):
        batches = [batch for step in train.epoch(epoch) for batch in step]
        index, weight = (torch.cat([batch[key] for batch in batches]) for key in ("index", "weight"))
        assert sorted(index.tolist()) == list(range(8))
        assert index[weight == 0].tolist() == [3]
        images = torch.cat([batch["images"] for batch in batches])
        assert int(images[index == 3].sum()) == 0
        assert all(int(image.sum()) for image in images[index != 3])
        assert train.skipped == {split.where(3)}


def test_too_large_image_obeys_the_same_rule(files):
    split = files()
    with pytest.raises(DataError, match=r"0\.jpg: 30 x 20 pixels are 0\.0 megapixels; at most 0\.0005"):
        list(EvalBatches(split, PLAIN, 4, max_megapixels=0.0005))
    batches = EvalBatches(split, PLAIN, 4, max_megapixels=0.0005, on_decode_error="skip")
    assert sum(float(batch["weight"].sum()) for batch in batches) == 0
    assert len(batches.skipped) == 8


def test_cached_images_are_read_once(files, tmp_path):
    split = files("count")
    train = TrainBatches(split, AUGMENTED, batch_size=4, cache="memory", workers=1)
    for epoch in range(3):
        list(train.epoch(epoch))
    assert [path.read_text() for path in tmp_path.glob("*.reads")] == ["x"] * 8


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("transform", [PLAIN, AUGMENTED, PUBLISHED, replace(PUBLISHED, augment="fgvc")])
def test_cached_images_are_those_that_are_read_anew(transform, workers, files):
    split = files()
    each = [TrainBatches(split, transform, batch_size=4, cache=cache, workers=workers) for cache in ("none", "memory")]
    for epoch in range(2):
        for (anew,), (cached,) in zip(*(batches.epoch(epoch) for batches in each), strict=True):
            assert torch.equal(anew["images"], cached["images"])
            assert anew["images"].dtype == cached["images"].dtype
            assert torch.equal(anew["index"], cached["index"])
    for batches in each:
        batches.close()


def test_cached_images_are_resized_once_where_nothing_is_drawn(files, monkeypatch):
    calls = []
    resize = transforms.vpt_resize
    monkeypatch.setattr(transforms, "vpt_resize", lambda *given: calls.append(given) or resize(*given))
    for transform, passes in ((PUBLISHED, 1), (replace(PUBLISHED, augment="fgvc"), 3)):
        calls.clear()
        train = TrainBatches(files(), transform, batch_size=4, cache="memory")
        for epoch in range(3):
            list(train.epoch(epoch))
        assert len(calls) == 8 * passes
    list(EvalBatches(files(), replace(PUBLISHED, augment="fgvc"), 4, cache="memory"))
    assert len(calls) == 8 * 4


@dataclass
class Memory:
    available: int  # bytes


@pytest.mark.parametrize(("transform", "pixels"), [(PLAIN, 8 * 8), (AUGMENTED, 18 * 27), (PUBLISHED, 8 * 8 * 4)])
def test_cache_that_does_not_fit(monkeypatch, transform, pixels):
    def first_step(**more):
        return next(TrainBatches(make_split(), transform, batch_size=2, world=2, cache="memory", **more).epoch(0))

    needed = 2 * N * pixels * 3  # on two processes
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(needed))
    first_step()
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(needed - 1))
    with pytest.raises(DataError, match=r"memory needs 0\.0 GiB for 53 images of .* px on 2 processes of this mach"):
        first_step()
    first_step(local_world=1)  # the other process is on another machine


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "fewer"), [(4.5, 1), (2.5, 0)])
def test_shared_memory_that_does_not_hold_the_batches(monkeypatch, slots, fewer):
    """Two processes on a machine, with two workers: five slots each. Reported before a worker dies of a bus error."""
    slot = 2 * 3 * PUBLISHED.image_size**2 * np.dtype(PUBLISHED.dtype).itemsize

    @dataclass
    class Small:
        f_bavail: int
        f_frsize: int = 1

    def first():
        train = TrainBatches(make_split(), PUBLISHED, batch_size=4, world=2, workers=2, local_world=2)
        try:
            return next(train.epoch(0))
        finally:
            train.close()

    monkeypatch.setattr(workers_module.os, "statvfs", lambda path: Small(int(2 * slots * slot)))
    with pytest.raises(DataError, match=rf"^data.workers = 2: .* 2 processes need .* set data.workers={fewer}, "):
        first()
    monkeypatch.setattr(workers_module.os, "statvfs", lambda path: Small(2 * 5 * slot))
    first()


def test_killed_worker_is_reported(files):
    batches = EvalBatches(files("kill"), PLAIN, 2, workers=1)
    with pytest.raises(DataError, match=r"died while it read .*/3\.jpg \(by SIGKILL\); .* lower data\.workers, or"):
        list(batches)


def test_bug_in_a_worker_keeps_its_traceback(files):
    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="a bug of ours"):
            list(EvalBatches(files("bug"), PLAIN, 2, workers=workers))


def test_batches_go_on_after_a_failure(files):
    split = files(bad=True)
    batches = EvalBatches(split, PLAIN, 2, workers=1)
    with pytest.raises(DataError, match=r"3\.jpg"):
        list(batches)
    Image.new("RGB", (20, 30)).save(split.where(3))
    assert len(list(batches)) == 4


@pytest.mark.slow
def test_closing_does_not_wait_for_the_garbage_collector():
    batches = EvalBatches(make_split(), PLAIN, 4, workers=2)
    batches.cycle = batches  # as an owner that the batches refer to would make it
    list(batches)
    processes = batches._source._pool._loader._iterator._workers
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 3
    assert not any(process.is_alive() for process in processes)
    batches.close()

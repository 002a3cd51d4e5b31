"""Batches: the same global batches whatever the number of processes, workers or accumulated micro-batches.

n examples of the split, b images of a micro-batch, S image side, R slots. The order of an epoch is a pure function of
(seed, epoch), and optimiser step s takes places s * batch_size onwards of it, so a run can stop after any
step and go on elsewhere.

Worker processes write pixels into slots of one shared tensor, each of which is copied out before it is written again:
fresh shared memory for each batch would cost a page fault for every 4 KiB.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, get_worker_info

from dist_vpt.data.splits import Split, shuffled
from dist_vpt.data.tasks import Cache
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import block_stop_signals
from dist_vpt.errors import DataError, UserError

BadImages = Literal["fail", "skip"]

# Pixels by image, None for one that is skipped, and the names of those newly found unreadable.
Found = tuple[list[np.ndarray | None], list[str]]

PIXELS: dict[Any, torch.dtype] = {np.uint8: torch.uint8, np.float32: torch.float32}
PADDING = -1  # the index of a place in a batch that holds no example
FILL_CHUNK = 32  # images per request while a cache is filled
PREFETCH = 2  # requests that a worker has at a time


class Batch(TypedDict):
    """A micro-batch on one process."""

    images: Any  # of the view's dtype [b, 3, S, S], or out of a cache what the frozen stream holds of them
    labels: torch.Tensor  # int64 [b]
    weight: torch.Tensor  # float32 [b]: 1 for an example, 0 for padding and for a skipped image
    index: torch.Tensor  # int64 [b]: place in the split, -1 for padding


class BatchSource(Protocol):
    """Where batches come from: images that are decoded, or a cache of what the frozen backbone makes of them."""

    skipped: set[str]  # files that could not be read so far

    def __call__(self, requests: list[tuple[int, np.ndarray]]) -> Iterator[Batch]: ...

    def close(self) -> None: ...


class TrainBatches:
    """Shuffled batches for training; nothing is dropped, the last global batch of an epoch is smaller."""

    def __init__(
        self,
        split: Split,
        view: ImageTransform,
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        workers: int = 0,
        on_decode_error: BadImages = "fail",
        max_megapixels: float = 178.0,
        cache: Cache = "none",
    ):
        """``batch_size`` images per optimiser step: ``world`` processes of ``accumulate`` micro-batches."""
        parts = world * accumulate
        if batch_size < 1 or batch_size % parts:
            lower = batch_size // parts * parts
            sizes = f"{lower} or {lower + parts}" if lower > 0 else f"{parts}"
            raise UserError(
                f"batch_size {batch_size}: must be a multiple of {parts} = {world} processes x {accumulate} "
                f"accumulated micro-batches; take {sizes}"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(split) // batch_size)
        self._n, self._seed = len(split), seed
        self._accumulate, self._rank, self._world = accumulate, rank, world
        pictures = _Pictures(split, view, True, on_decode_error, max_megapixels)
        batches = _Batches(pictures, seed)
        self._feed: BatchSource = _Feed(batches, batch_size // parts, workers, cache, range(len(split)), world)

    def __len__(self) -> int:
        return self.steps_per_epoch

    @property
    def skipped(self) -> set[str]:
        """Files that this process could not read so far (``on_decode_error="skip"``)."""
        return self._feed.skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """For each optimiser step from ``start_step`` on, its micro-batches on this process.

        Starting another epoch ends the one before.
        """
        parts = self._world * self._accumulate
        order = shuffled(self._n, self._seed, epoch)
        requests = []
        for step in range(start_step, self.steps_per_epoch):
            indices = _padded(order[step * self.batch_size : (step + 1) * self.batch_size], parts)
            # Dealt like cards, so that padding is spread over processes and micro-batches.
            for micro in range(self._accumulate):
                requests.append((epoch, indices[micro * self._world + self._rank :: parts]))
        batches = self._feed(requests)
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(batches) for _ in range(self._accumulate)]

    def use(self, feed: BatchSource) -> None:
        """Take the same batches from another feed from now on."""
        self._feed.close()
        self._feed = feed

    def close(self) -> None:
        """End the worker processes at once; a later epoch starts them anew."""
        self._feed.close()


class EvalBatches:
    """Every example of a split once, in the split's order, dealt to the processes in turn."""

    def __init__(
        self,
        split: Split,
        view: ImageTransform,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        on_decode_error: BadImages = "fail",
        max_megapixels: float = 178.0,
        cache: Cache = "none",
    ):
        """``batch_size`` images per batch and process; all processes yield equally many and equally large."""
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1")
        self._indices = _padded(np.arange(len(split)), world)[rank::world]
        self._starts = range(0, len(self._indices), batch_size)
        self._batch_size = batch_size
        pictures = _Pictures(split, view, False, on_decode_error, max_megapixels)
        mine = [int(i) for i in self._indices if i != PADDING]
        self._feed: BatchSource = _Feed(_Batches(pictures, 0), batch_size, workers, cache, mine, world)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def skipped(self) -> set[str]:
        """Files that this process could not read so far (``on_decode_error="skip"``)."""
        return self._feed.skipped

    def __iter__(self) -> Iterator[Batch]:
        return self._feed([(0, self._indices[start : start + self._batch_size]) for start in self._starts])

    def use(self, feed: BatchSource) -> None:
        """Take the same batches from another feed from now on."""
        self._feed.close()
        self._feed = feed

    def close(self) -> None:
        """End the worker processes at once; a later pass starts them anew."""
        self._feed.close()


def _padded(indices: np.ndarray, multiple: int) -> np.ndarray:
    return np.pad(indices, (0, -len(indices) % multiple), constant_values=PADDING)


@dataclass
class _Pictures:
    """The unchanging pixels of some images, and the files that could not be read. W worker processes."""

    split: Split
    view: ImageTransform
    train: bool
    on_decode_error: BadImages
    max_megapixels: float
    reading: torch.Tensor | None = None  # int64 [W], shared with the workers: the image that each is at

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Found | DataError:
        """A DataError is returned, not raised: torch would turn it into a traceback in a string."""
        pixels: list[np.ndarray | None] = []
        unreadable = []
        worker = get_worker_info()
        for i in indices:
            if worker is not None and self.reading is not None:
                self.reading[worker.id] = int(i)
            try:
                pixels.append(self.view.fixed(self.split.read(int(i), self.max_megapixels), self.train))
            except DataError as error:
                if self.on_decode_error == "fail":
                    return error
                unreadable.append(self.split.where(int(i)))
                pixels.append(None)
        return pixels, unreadable


@dataclass
class _Cached:
    """What _Pictures gave for every image this process needs."""

    pixels: dict[int, np.ndarray | None]

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Found:
        return [self.pixels[int(i)] for i in indices], []


@dataclass
class _Batches:
    """Micro-batches by (epoch, indices, slot), their images in the slot where there is one."""

    pictures: _Pictures
    seed: int
    cached: _Cached | None = None
    slots: torch.Tensor | None = None  # [R, b, 3, S, S], shared with the workers

    def empty(self, *shape: int) -> torch.Tensor:
        """Room for images [*shape, 3, S, S]."""
        size = self.pictures.view.image_size
        return torch.empty((*shape, 3, size, size), dtype=PIXELS[self.pictures.view.dtype])

    def __getitem__(self, request: tuple[int, np.ndarray, int | None]) -> tuple[Batch, list[str]] | DataError:
        epoch, index_b, slot = request
        split, view, train = self.pictures.split, self.pictures.view, self.pictures.train
        images = self.empty(len(index_b)) if slot is None else self._in_slot(slot, len(index_b))
        images_b3SS = images.numpy()
        labels_b = np.zeros(len(index_b), np.int64)
        weight_b = np.zeros(len(index_b), np.float32)
        places = np.flatnonzero(index_b != PADDING)
        found = (self.cached or self.pictures)[index_b[places]]
        if isinstance(found, DataError):
            return found
        pixels, unreadable = found
        for place, pixels_HW3 in zip(places, pixels, strict=True):
            i = int(index_b[place])
            labels_b[place] = split.labels[i]
            if pixels_HW3 is not None:
                pixels_SS3 = view.varied(pixels_HW3, train, self.seed, epoch, i)
                images_b3SS[place] = pixels_SS3.transpose(2, 0, 1)
                weight_b[place] = 1
        images_b3SS[weight_b == 0] = 0
        batch = Batch(
            images=images if slot is None else None,
            labels=torch.from_numpy(labels_b),
            weight=torch.from_numpy(weight_b),
            index=torch.from_numpy(index_b.astype(np.int64)),
        )
        return batch, unreadable

    def taken(self, slot: int, images: int) -> torch.Tensor:
        """A copy of a slot's images, in pinned memory where there is a GPU."""
        written = self._in_slot(slot, images)
        return torch.empty_like(written, pin_memory=torch.cuda.is_available()).copy_(written)

    def _in_slot(self, slot: int, images: int) -> torch.Tensor:
        assert self.slots is not None
        return self.slots[slot, :images]


class _Feed:
    """Asks for batches, through worker processes or a cache, and raises what went wrong there."""

    def __init__(  # noqa: PLR0917 (what to load, and how)
        self, batches: _Batches, largest: int, workers: int, cache: Cache, needed: Sequence[int], world: int
    ):
        """``largest``: images of a micro-batch at the most."""
        self.skipped: set[str] = set()
        self._batches, self._largest, self._workers, self._cache = batches, largest, workers, cache
        self._needed, self._world = needed, world
        self._pool = _Pool(batches, batches.pictures, 0 if cache == "memory" else workers)
        self._pass = 0

    def __call__(self, requests: list[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        self._pass += 1
        this_pass = self._pass
        if self._cache == "memory" and self._batches.cached is None:
            self._batches.cached = self._filled()
        # One batch is being copied out while each worker has its requests. Dealt in turn: a slot comes up again
        # only when its batch has been copied.
        count = PREFETCH * self._pool.workers + 1
        if self._pool.workers and self._batches.slots is None:
            self._batches.slots = self._batches.empty(count, self._largest).share_memory_()
        slots = [number % count if self._pool.workers else None for number in range(len(requests))]
        answers = self._pool([(*request, slot) for request, slot in zip(requests, slots, strict=True)])
        for slot, (batch, unreadable) in zip(slots, answers, strict=False):
            self.skipped.update(unreadable)
            if slot is not None:
                batch["images"] = self._batches.taken(slot, len(batch["index"]))
            yield batch
            if self._pass != this_pass:
                raise RuntimeError("a later pass over these batches was started, which ended this one")

    def close(self) -> None:
        self._pool.close()
        self._batches.slots = None

    def _filled(self) -> _Cached:
        pictures = self._batches.pictures
        _check_memory(pictures, len(self._needed), self._world)
        chunks = [self._needed[k : k + FILL_CHUNK] for k in range(0, len(self._needed), FILL_CHUNK)]
        pixels: dict[int, np.ndarray | None] = {}
        pool = _Pool(pictures, pictures, self._workers)
        for chunk, (found, unreadable) in zip(chunks, pool(chunks), strict=True):
            pixels.update(zip(chunk, found, strict=True))
            self.skipped.update(unreadable)
        pool.close()
        return _Cached(pixels)


class _Pool:
    """A dataset's answers to a list of requests, in order, from ``workers`` processes that stay alive."""

    def __init__(self, dataset: Any, pictures: _Pictures, workers: int):
        self.workers, self._pictures = workers, pictures
        self._requests: list = []  # read by the loader anew for each pass
        self._loader: DataLoader = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_forkserver() if workers else None,
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # of its own, or each pass would draw from the global one
        )

    def __call__(self, requests: list) -> Iterator[Any]:
        self._requests[:] = requests
        if self.workers and self._loader._iterator is None:
            self._pictures.reading = torch.full((self.workers,), PADDING).share_memory_()
        try:
            with block_stop_signals():
                answers = iter(self._loader)
            for answer in answers:
                if isinstance(answer, DataError):
                    raise answer
                yield answer
        except Exception as error:
            died = self._died()
            self.close()
            lost = isinstance(error, (RuntimeError, OSError, EOFError)) and self.workers
            if not lost or "in DataLoader worker process" in str(error):
                raise  # a DataError, or raised by our own code: a bug, with its traceback
            raise DataError(
                f"a process that loads images died {died or f'({type(error).__name__}: {str(error).strip()})'}; mostly "
                f"memory or shared memory (/dev/shm) ran out: lower data.workers, or enlarge /dev/shm"
            ) from error

    def _died(self) -> str:
        """The workers that have ended by themselves, how, and the images that they were at."""
        iterator: Any = self._loader._iterator
        if iterator is None or self._pictures.reading is None:
            return ""
        told = []
        for number, process in enumerate(iterator._workers):
            if not process.exitcode:
                continue
            image = int(self._pictures.reading[number])
            at = self._pictures.split.where(image) if image != PADDING else "no image yet"
            code = process.exitcode
            told.append(f"{at} (by {signal.Signals(-code).name if code < 0 else f'exit code {code}'})")
        return f"while it read {', '.join(told)}" if told else ""

    def close(self) -> None:
        """End the workers now: left to the garbage collector, torch can wait five seconds for each."""
        iterator: Any = self._loader._iterator  # None unless workers are alive
        if iterator is not None:
            self._loader._iterator = None
            iterator._shutdown_workers()


def _end_with_parent(worker: int) -> None:
    """In a worker: end when the training process does, however it ends. Torch would wait for the server's end."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(answer: Any) -> Any:
    return answer


def _forkserver() -> Any:
    """Workers are forked from a server that has imported this module and nothing of the training process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _check_memory(pictures: _Pictures, images: int, world: int) -> None:
    view = pictures.view
    cropped_later = pictures.train and view.augment == "fgvc"
    # Before a random crop the shorter side is known and the longer is not: take pictures of 3:2. Before a vpt resize
    # no side is known: take the square's.
    pixels = view.shorter_side**2 * 1.5 if cropped_later else view.image_size**2
    processes = LaunchEnv.current().local_world_size or world
    needed, available = images * pixels * 3 * processes, psutil.virtual_memory().available
    if needed > available:
        raise DataError(
            f"data.cache: memory needs {needed / 2**30:.1f} GiB for {images} images of {view.image_size} px "
            f"on {processes} processes of this machine, and {available / 2**30:.1f} GiB are free; "
            f"set data.cache=none"
        )

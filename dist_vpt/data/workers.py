"""Worker processes that decode images, the cache in memory, and shared memory through which batches come.

b images of a micro-batch, S image side, R slots, W worker processes.

Workers write pixels into slots of one shared tensor, each of which is copied out before it is written again:
fresh shared memory for each batch would cost a page fault for every 4 KiB.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection
from typing import Any, ClassVar, Literal, Protocol, TypedDict
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from dist_vpt.data.device_images import DeviceImages
from dist_vpt.data.labels import batch_labels
from dist_vpt.data.pieces import pieces_of
from dist_vpt.data.read_ahead import reading_ahead
from dist_vpt.data.splits import Picture, Split
from dist_vpt.data.tasks import Cache
from dist_vpt.data.transforms import ImageTransform, channels_first
from dist_vpt.data.worker_memory import check_cache_memory, check_shared_memory
from dist_vpt.distributed.signals import block_stop_signals, follow_stop_flag, share_stop_flag
from dist_vpt.errors import DataError, Interrupted, SourceUnavailable

BadImages = Literal["fail", "skip"]

# The epoch, or a number in its place for each position, and the images: -1 for padding.
Request = tuple[int | np.ndarray, np.ndarray]

# Pixels by image, None for one that is skipped, and the names of those newly found unreadable.
Found = tuple[list[np.ndarray | None], list[str]]

Failed = DataError | Interrupted

PIXELS: dict[Any, torch.dtype] = {np.uint8: torch.uint8, np.float32: torch.float32}
PADDING = -1  # the index of a position in a batch that holds no example
FILL_CHUNK = 32  # images per request while a cache is filled
EXIT_SECONDS = 2.0  # at most, from a worker's lost connection to its exit code
PREFETCH = 2  # requests that a worker has at a time


class Batch(TypedDict):
    """A micro-batch on one process."""

    images: Any  # of the transform's dtype [b, 3, S, S] or [b, V, 3, S, S]; from a cache what the frozen stream holds
    labels: torch.Tensor  # int64 [b], or float32 [b, K] of 0 and 1 where images have several labels
    weight: torch.Tensor  # float32 [b]: 1 for an example, 0 for padding and for a skipped image
    index: torch.Tensor  # int64 [b]: position in the split, -1 for padding


class BatchSource(Protocol):
    """Where batches come from: images that are decoded, or a cache of what the frozen backbone makes of them."""

    @property
    def skipped(self) -> set[str]:
        """Files that could not be read so far."""
        ...

    def __call__(self, requests: list[Request]) -> Iterator[Batch]: ...

    def close(self) -> None: ...


@dataclass
class ImageReader:
    """Reads images: the part of their pixels that never changes, and which files could not be read.

    ``final``: reads what a batch holds of an image instead, [3, S, S], where nothing is drawn.
    """

    split: Split
    transform: ImageTransform
    train: bool
    on_decode_error: BadImages
    max_megapixels: float
    final: bool = False
    reading: torch.Tensor | None = None  # int64 [W], shared with the workers: the image that each one reads
    stopping: torch.Tensor | None = None  # uint8 [1], shared with the workers: whether a stop was asked for

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Found | Failed:
        """An error is returned, not raised: torch would turn it into a traceback in a string."""
        pixels: list[np.ndarray | None] = []
        unreadable = []
        worker = get_worker_info()
        for i in indices:
            if worker is not None and self.reading is not None:
                self.reading[worker.id] = int(i)
            try:
                picture = self.split.read(int(i), self.max_megapixels)
                pixels.append(self._fixed(picture, int(i)))
            except DataError as error:
                if self.on_decode_error == "fail" or isinstance(error, SourceUnavailable):
                    return error
                unreadable.append(self.split.where(int(i)))
                pixels.append(None)
            except Interrupted as stopped:  # while its piece was waited for
                return stopped
        return pixels, unreadable

    def _fixed(self, picture: Picture, i: int) -> np.ndarray:
        try:
            fixed = self.transform.fixed(picture, self.train)
            if not self.final:
                return fixed
            return np.ascontiguousarray(channels_first(self.transform.varied(fixed, self.train, 0, 0, i)))
        except DataError as error:
            raise DataError(f"{self.split.where(i)}: {error}") from error


@dataclass
class CachedImages:
    """The answers of an ImageReader for every image that this process needs; ``final`` as there."""

    pixels: dict[int, np.ndarray | None]
    final: bool

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Found:
        return [self.pixels[int(i)] for i in indices], []


@dataclass
class ImageBatches:
    """Micro-batches by (epoch, indices, slot); images are written into the slot if one is given."""

    reader: ImageReader
    seed: int
    cached: CachedImages | None = None
    slots: torch.Tensor | None = None  # [R, b, 3, S, S], shared with the workers

    def empty(self, *shape: int) -> torch.Tensor:
        """Uninitialized images [*shape, 3, S, S], or of several views [*shape, V, 3, S, S]."""
        transform = self.reader.transform
        return torch.empty((*shape, *transform.shape(self.reader.train)), dtype=PIXELS[transform.dtype])

    def __getitem__(self, request: tuple[int | np.ndarray, np.ndarray, int | None]) -> tuple[Batch, list[str]] | Failed:
        epoch, index_b, slot = request
        epoch_b = np.broadcast_to(epoch, len(index_b))
        images = self.empty(len(index_b)) if slot is None else self._in_slot(slot, len(index_b))
        images_b3SS = images.numpy()
        weight_b = np.zeros(len(index_b), np.float32)
        positions = np.flatnonzero(index_b != PADDING)
        found = (self.cached or self.reader)[index_b[positions]]
        if isinstance(found, Failed):
            return found
        pixels, unreadable = found
        final = self.cached is not None and self.cached.final
        for position, stored in zip(positions, pixels, strict=True):
            i = int(index_b[position])
            if stored is not None:
                images_b3SS[position] = stored if final else self._varied(stored, int(epoch_b[position]), i)
                weight_b[position] = 1
        images_b3SS[weight_b == 0] = 0
        batch = Batch(
            images=images if slot is None else None,
            labels=torch.from_numpy(batch_labels(self.reader.split.labels, index_b)),
            weight=torch.from_numpy(weight_b),
            index=torch.from_numpy(index_b.astype(np.int64)),
        )
        return batch, unreadable

    def _varied(self, pixels_HW3: np.ndarray, epoch: int, i: int) -> np.ndarray:
        reader = self.reader
        return channels_first(reader.transform.varied(pixels_HW3, reader.train, self.seed, epoch, i))

    def taken(self, slot: int, images: int) -> torch.Tensor:
        """A copy of a slot's images, in pinned memory where this process computes on a GPU."""
        written = self._in_slot(slot, images)
        return torch.empty_like(written, pin_memory=torch.cuda.is_initialized()).copy_(written)

    def _in_slot(self, slot: int, images: int) -> torch.Tensor:
        assert self.slots is not None
        return self.slots[slot, :images]


class WorkerSource:
    """Batches from worker processes or the cache in memory. Raises the errors of the workers."""

    def __init__(  # noqa: PLR0917 (what to load, and how)
        self, batches: ImageBatches, largest: int, workers: int, cache: Cache, needed: Sequence[int], local_world: int
    ):
        """``largest``: images of the largest micro-batch; ``local_world``: processes on this machine."""
        self.skipped: set[str] = set()
        self._batches, self._largest, self._workers, self._cache = batches, largest, workers, cache
        self._needed, self._local_world = needed, local_world
        self._pieces = pieces_of(batches.reader.split.source)
        self._pool = WorkerPool(batches, batches.reader, 0 if cache == "memory" else workers)
        self._pass = 0
        self._device, self._budget = torch.device("cpu"), 0.0
        self._on_device: DeviceImages | None = None

    @property
    def ahead(self) -> int:
        """How many batches workers make, or have made, before they are asked for."""
        return PREFETCH * self._pool.workers

    def __call__(self, requests: list[Request]) -> Iterator[Batch]:
        self._pass += 1
        this_pass = self._pass
        if self._cache == "memory" and self._batches.cached is None and self._on_device is None:
            self._keep(self._filled())
        if self._on_device is not None:
            yield from self._from_device(self._on_device, requests)
            return
        # One batch is being copied out while each worker has its requests. Slots are used in turn: one is used again
        # only when its batch has been copied.
        count = self.ahead + 1
        if self._pool.workers and self._batches.slots is None:
            slots_Rb3SS = self._batches.empty(count, self._largest)
            slot_bytes, workers = slots_Rb3SS.nbytes // count, self._pool.workers
            check_shared_memory(slot_bytes, workers, PREFETCH * workers + 1, self._local_world)
            self._batches.slots = slots_Rb3SS.share_memory_()
        slots = [number % count if self._pool.workers else None for number in range(len(requests))]
        answers = self._pool([(*request, slot) for request, slot in zip(requests, slots, strict=True)])
        with reading_ahead(self._pieces, [index_b for _, index_b in requests]) as ahead:
            for number, (slot, (batch, unreadable)) in enumerate(zip(slots, answers, strict=False)):
                if ahead is not None:
                    ahead.advance(number)
                self.skipped.update(unreadable)
                if slot is not None:
                    batch["images"] = self._batches.taken(slot, len(batch["index"]))
                yield batch
                if self._pass != this_pass:
                    raise RuntimeError("a later pass over these batches was started, which ended this one")

    def close(self) -> None:
        self._pool.close()
        self._batches.slots = None

    def keep_on(self, device: torch.device, budget: float) -> None:
        """Keep what ``data.cache: memory`` keeps on a device instead, if it takes at most ``budget`` bytes there."""
        self._device, self._budget = device, budget

    def _keep(self, filled: CachedImages) -> None:
        reader = self._batches.reader
        on_host = reader.train and reader.transform.rand_augment is not None  # Pillow's operations
        if on_host or not 0 < DeviceImages.nbytes(filled.pixels) <= self._budget:
            self._batches.cached = filled
            return
        transform, seed = self._batches.reader.transform, self._batches.seed
        self._on_device = DeviceImages(filled.pixels, transform, self._device, seed=seed, final=filled.final)

    def _from_device(self, images: DeviceImages, requests: list[Request]) -> Iterator[Batch]:
        labels = self._batches.reader.split.labels
        for epoch, index_b in requests:
            weight_b = np.array([images.is_readable(int(i)) for i in index_b], np.float32)
            yield Batch(
                images=images(epoch, index_b),
                labels=torch.from_numpy(batch_labels(labels, index_b)),
                weight=torch.from_numpy(weight_b),
                index=torch.from_numpy(index_b.astype(np.int64)),
            )

    def _filled(self) -> CachedImages:
        given = self._batches.reader
        reader = replace(given, final=not given.transform.draws(given.train))
        check_cache_memory(
            reader.transform, len(self._needed), self._local_world, train=reader.train, final=reader.final
        )
        chunks = [self._needed[k : k + FILL_CHUNK] for k in range(0, len(self._needed), FILL_CHUNK)]
        pixels: dict[int, np.ndarray | None] = {}
        pool = WorkerPool(reader, reader, self._workers)
        with reading_ahead(self._pieces, [np.array(chunk) for chunk in chunks]) as ahead:
            for number, (chunk, (found, unreadable)) in enumerate(zip(chunks, pool(chunks), strict=True)):
                if ahead is not None:
                    ahead.advance(number)
                pixels.update(zip(chunk, found, strict=True))
                self.skipped.update(unreadable)
        pool.close()
        return CachedImages(pixels, reader.final)


class WorkerPool:
    """A dataset's answers to a list of requests, in order, from ``workers`` persistent processes."""

    every: ClassVar["WeakSet[WorkerPool]"] = WeakSet()

    def __init__(self, dataset: Any, reader: ImageReader, workers: int):
        self.workers, self._reader = workers, reader
        self.every.add(self)
        self._requests: list = []  # read again by the loader for each pass
        self._loader: DataLoader = DataLoader(
            dataset,
            sampler=self._requests,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_initialized(),
            multiprocessing_context=_forkserver(reader.transform) if workers else None,
            worker_init_fn=partial(_start_worker, reader),
            generator=torch.Generator(),  # its own, or each pass would draw from the global one
        )

    def __call__(self, requests: list) -> Iterator[Any]:
        self._requests[:] = requests
        if self.workers and self._loader._iterator is None:
            self._reader.reading = torch.full((self.workers,), PADDING).share_memory_()
            self._reader.stopping = share_stop_flag()
        try:
            with block_stop_signals():
                answers = iter(self._loader)
            for answer in answers:
                if isinstance(answer, Failed):
                    raise answer
                yield answer
        except Exception as error:
            lost = isinstance(error, (RuntimeError, OSError, EOFError)) and self.workers
            died = self._died() if lost else ""
            self.close()
            if not lost or "in DataLoader worker process" in str(error):
                raise  # one of Failed, or an error in this package: a bug, with its traceback
            raise DataError(
                f"a process that loads images died {died or f'({type(error).__name__}: {str(error).strip()})'}; mostly "
                f"memory or shared memory (/dev/shm) ran out: lower data.workers, or enlarge /dev/shm"
            ) from error

    def _died(self) -> str:
        """Which workers have died, how, and which images they were reading."""
        iterator: Any = self._loader._iterator
        if iterator is None or self._reader.reading is None:
            return ""
        deaths = []
        # Its connection is lost before its exit code is known.
        connection.wait([process.sentinel for process in iterator._workers], timeout=EXIT_SECONDS)
        for number, process in enumerate(iterator._workers):
            if not process.exitcode:
                continue
            image = int(self._reader.reading[number])
            location = self._reader.split.where(image) if image != PADDING else "no image yet"
            code = process.exitcode
            deaths.append(f"{location} (by {signal.Signals(-code).name if code < 0 else f'exit code {code}'})")
        return f"while it read {', '.join(deaths)}" if deaths else ""

    def close(self) -> None:
        """End the workers now: left to the garbage collector, torch can wait five seconds for each."""
        iterator: Any = self._loader._iterator  # None unless workers are alive
        if iterator is not None:
            self._loader._iterator = None
            iterator._shutdown_workers()


@atexit.register
def _close_all() -> None:
    """At exit, multiprocessing would wait for workers that an error has left: they do not get its SIGTERM."""
    for pool in list(WorkerPool.every):
        pool.close()


def _start_worker(reader: ImageReader, worker: int) -> None:
    """In a worker: exit when the training process ends, however it ends; torch would wait for the server's end.

    Where that process is asked to stop, the worker waits no longer for data.
    """
    follow_stop_flag(reader.stopping)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _unchanged(answer: Any) -> Any:
    return answer


def _forkserver(transform: ImageTransform) -> Any:
    """Workers are forked from a server that has imported this module and nothing of the training process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(["timm.data"] if transform.rand_augment else [])])
    return context

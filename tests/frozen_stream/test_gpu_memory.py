"""What a cache leaves free on a GPU, how it is filled, how rows get there from host memory; all of it on the CPU."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.data.loaders import PADDING, EvalBatches
from dist_vpt.data.splits import ArraySource, Split
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.launch_env import PROCESSES_PER_GPU, LaunchEnv, detach_from_launcher
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.frozen_stream import placement, prefetch, timing
from dist_vpt.frozen_stream.cache import CachedBatches, StreamCache, fill, nbytes
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.frozen_stream.placement import Sharing, choose, open_streams, step_bytes
from dist_vpt.frozen_stream.prefetch import DeviceCopy, prefetched
from dist_vpt.frozen_stream.timing import Speeds, measure
from tests.methods.conftest import make_backbone

GIB = 2**30
CPU = torch.device("cpu")
SPEC = StreamSpec((0, 2), keys=True)
SPLIT = Split(
    "val",
    np.arange(11, dtype=np.int64) % 3,
    ArraySource(np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8), "noise"),
)


def batches(rank: int = 0, world: int = 1) -> EvalBatches:
    return EvalBatches(SPLIT, ImageTransform(16, "bilinear", "squash"), 2, rank=rank, world=world)


def free_on_gpu(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gib * GIB), 80 * GIB))
    monkeypatch.setattr(placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


def test_processes_of_a_gpu_share_it_and_keep_what_a_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 % of 10 GiB: 8 for one process, 4 for each of two, less what a step takes."""
    free_on_gpu(monkeypatch, 10)

    def location(gib: float, sharing: Sharing) -> str:
        return choose(StreamConfig(), (int(gib * GIB),) * 2, torch.device("cuda"), lambda: GIB, sharing).location

    assert location(7.9, Sharing()) == "device"
    assert location(3.9, Sharing(8, on_gpu=2)) == "device"
    assert location(4.1, Sharing(8, on_gpu=2)) == "none"
    assert location(2.9, Sharing(on_gpu=2, step=GIB)) == "device"
    assert location(3.1, Sharing(on_gpu=2, step=GIB)) == "none"
    line = choose(StreamConfig(), (9 * GIB,) * 2, torch.device("cuda"), lambda: 9 * GIB, Sharing(2, 2, GIB)).line
    assert "3.00 GiB may be used on the accelerator for each of 2 processes" in line
    assert location(0.1, Sharing(step=9 * GIB)) == "none"


@pytest.mark.parametrize(
    ("processes", "gpus", "given", "on_gpu"), [(8, 8, None, 1), (6, 4, None, 2), (1, 0, None, 1), (4, 1, 1, 1)]
)
def test_who_shares_a_gpu(
    processes: int, gpus: int, given: int | None, on_gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    launch = LaunchEnv(local_world_size=processes, processes_per_gpu=given)
    assert Sharing.of(launch, 5) == Sharing(processes, on_gpu, 5)


@pytest.mark.parametrize(("visible", "on_gpu"), [(None, 1), ("0,1,2,3", 1), ("5", 4), ("5,6,7", 2)])
def test_a_process_that_trains_alone_still_knows_its_neighbors(
    visible: str | None, on_gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # asked where nothing is listed
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert detach_from_launcher(LaunchEnv.current()).processes_per_gpu == on_gpu
    assert os.environ[PROCESSES_PER_GPU] == str(on_gpu)


def test_what_a_step_needs_is_no_less_than_what_it_holds() -> None:
    """The rows of a batch and of the next, and a live batch's largest activation, of the MLP: four widths."""
    backbone = make_backbone()
    mlp = 7 * backbone.tokens * 4 * backbone.width * 4
    assert step_bytes(backbone, SPEC, 7) >= 2 * nbytes(backbone, SPEC, 7) + 2 * mlp
    assert step_bytes(backbone, SPEC, 14) == 2 * step_bytes(backbone, SPEC, 7)


def test_other_processes_rows_are_gathered_block_by_block() -> None:
    """Two processes, the second one played: one array of a batch is gathered at once, and the cache is whole."""
    backbone = make_backbone()
    whole = fill(backbone, SPEC, batches(), SPLIT, RankAccelerator(cpu=True), CPU, StopSignal())
    others = iter(list(batches(1, 2)))
    gathered: list[int] = []

    class Two(RankAccelerator):
        num_processes = 2  # type: ignore[assignment]

        def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
            return tensor

        def gather(self, rows: Any) -> Any:
            if isinstance(rows, tuple):  # index and weight: the other process's batch begins
                self.batch = next(others)
                output = compute_stream(backbone, self.batch["images"], SPEC)
                self.arrays = iter([output.pooled, *output.keys, *output.values])
                return tuple(
                    torch.cat([a, self.batch[name]]) for a, name in zip(rows, ("index", "weight"), strict=True)
                )
            gathered.append(2 * rows.nbytes)
            return torch.cat([rows, next(self.arrays)])

    found = fill(backbone, SPEC, batches(0, 2), SPLIT, Two(cpu=True), CPU, StopSignal())
    for a, b in zip(whole.kept.keys + whole.kept.values, found.kept.keys + found.kept.values, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(whole.kept.pooled, found.kept.pooled, atol=1e-6)
    assert found.readable_n.all()
    assert max(gathered) == nbytes(backbone, StreamSpec((0,)), 4) - 4 * backbone.width * 4  # one block's keys


def test_the_next_batch_is_made_while_one_is_used() -> None:
    made: list[int] = []
    names: set[str] = set()
    second = threading.Event()

    def make(number: int) -> torch.Tensor:
        made.append(number)
        names.add(threading.current_thread().name)
        if number == 1:
            second.set()
        return torch.tensor(number)

    answers = prefetched(make, [0, 1, 2, 3], CPU)
    assert next(answers) == 0
    assert second.wait(10)  # without asking for it
    time.sleep(0.05)
    assert made == [0, 1]  # and no further
    assert [int(answer) for answer in answers] == [1, 2, 3]
    assert all(name.startswith("stream-cache") for name in names)


def test_errors_and_the_end_of_a_pass_reach_the_thread() -> None:
    def make(number: int) -> torch.Tensor:
        if number == 1:
            raise OSError("the file is gone")
        return torch.tensor(number)

    answers = prefetched(make, [0, 1, 2], CPU)
    assert next(answers) == 0
    with pytest.raises(OSError, match="the file is gone"):
        next(answers)
    unread = prefetched(make, [0, 2], CPU)
    next(unread)
    unread.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("stream-cache")]
    assert list(prefetched(make, [], CPU)) == []


class FakeCuda:
    """Streams and events of a CUDA device that note what is called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[str] = []
        self.current = FakeStream(self, "main")
        self.made = 0
        prefetch.side_stream.cache_clear()
        for name, fake in (("Stream", self.new), ("stream", self.within), ("current_stream", lambda _: self.current)):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(prefetch, "send_to_device", self.send)

    def new(self, device: torch.device) -> Any:
        self.made += 1
        return FakeStream(self, f"side {self.made}")

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        self.current, before = stream, self.current
        yield
        self.current = before

    def send(self, made: Any, device: torch.device, non_blocking: bool) -> Any:
        assert non_blocking
        self.calls.append(f"copy on {self.current.name}")
        return {key: FakeTensor(self, key) for key in made}


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str):
        self.cuda, self.name = cuda, name

    def record_event(self) -> str:
        self.cuda.calls.append(f"event of {self.name}")
        return self.name

    def wait_event(self, event: str) -> None:
        self.cuda.calls.append(f"{self.name} waits for {event}")


class FakeTensor:
    def __init__(self, cuda: FakeCuda, name: str):
        self.cuda, self.name = cuda, name

    def record_stream(self, stream: FakeStream) -> None:
        self.cuda.calls.append(f"{self.name} is used by {stream.name}")


def test_copies_to_a_gpu_go_through_one_stream_a_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current stream waits for a copy when its tensors are wanted, and not before."""
    cuda, device = FakeCuda(monkeypatch), torch.device("cuda", 0)
    first, rows = DeviceCopy({"images": 0}, device, "batches"), DeviceCopy({"rows": 0}, device, "rows")
    assert cuda.calls == ["copy on side 1", "event of side 1", "copy on side 2", "event of side 2"]
    cuda.calls.clear()
    rows.arrived()
    assert cuda.calls == ["main waits for side 2", "rows is used by main"]
    cuda.calls.clear()
    assert set(first.arrived()) == {"images"}
    second = DeviceCopy({"images": 0}, device, "batches")
    second.arrived()
    assert cuda.calls[:3] == ["main waits for side 1", "images is used by main", "copy on side 1"]
    assert cuda.made == 2, "the allocator keeps memory for each stream"
    prefetch.side_stream.cache_clear()


def test_rows_from_host_memory_are_the_same_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device it is seen that they are sent; with the CPU in its place, that their values stay."""
    kept = StreamOutput(torch.arange(8.0).view(4, 2), (torch.arange(24.0).view(4, 3, 2),))
    cache, labels = StreamCache(kept, np.ones(4, bool)), np.arange(4)
    requests = [(0, np.array([3, PADDING, 1])), (0, np.array([2, 0, PADDING]))]
    assert [b["images"].pooled.device.type for b in CachedBatches(cache, labels, set(), torch.device("meta"))(requests)]
    ahead = CachedBatches(cache, labels, set(), CPU)
    monkeypatch.setattr(ahead, "_ahead", CPU)
    for a, b in zip(ahead(requests), CachedBatches(cache, labels, set())(requests), strict=True):
        assert torch.equal(a["images"].pooled, b["images"].pooled)
        assert torch.equal(a["images"].normed[0], b["images"].normed[0])
        assert torch.equal(a["weight"], b["weight"])


class Loader:
    """Batches of 2 images and a clock: those that workers had prefetched come at once, and others take ``seconds``.

    While somebody waits for the first batch of a pass, ``ahead`` ones after it are made, too.
    """

    def __init__(self, number: int, ahead: int, seconds: float, first_pass: float = 0.0):
        self.ahead, self.clock, self.passes, self.read = ahead, 0.0, 0, 0
        self.number, self.seconds, self.start = number, seconds, first_pass

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for number in range(self.number):
            at_once = 0 < number <= self.ahead
            self.clock += 0.0 if at_once else self.seconds
            self.clock += self.start if self.passes == 1 and number == 0 else 0.0
            self.read += 1
            yield {"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "index": torch.arange(2)}

    def speeds(self, monkeypatch: pytest.MonkeyPatch) -> Speeds:
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.clock)
        return measure(make_backbone(), SPEC, self, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("ahead", [0, 2, 6])
def test_prefetched_batches_are_not_timed(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what the first batch takes, for which workers start; 3 s for 2 images that nobody had decoded."""
    loader = Loader(100, ahead, 3.0, first_pass=50.0)
    assert loader.speeds(monkeypatch) == Speeds(1500.0, 0.0)
    assert loader.read == 1 + ahead + max(timing.BATCHES, ahead)
    assert loader.passes == 1


def test_of_a_small_split_a_whole_second_pass_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight batches, of which one round of four workers makes all but one: 2 x 3 s in each pass for 16 images."""
    loader = Loader(8, 6, 3.0, first_pass=50.0)
    assert loader.speeds(monkeypatch) == Speeds(1000 * 2 * 3.0 / 16, 0.0)
    assert (loader.passes, loader.read) == (2, 16)


def test_computing_and_copying_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a batch's stream takes 4 s, and the rows of 2 images that come from host memory 1 s."""
    loader, compute, send = Loader(100, 2, 0.0), timing.compute_stream, timing.send_to_device

    def slow(seconds: float, call: Any) -> Any:
        def made(*args: Any) -> Any:
            loader.clock += seconds
            return call(*args)

        return made

    monkeypatch.setattr(timing, "compute_stream", slow(4.0, compute))
    monkeypatch.setattr(timing, "send_to_device", slow(1.0, send))
    speeds = loader.speeds(monkeypatch)
    assert speeds == Speeds(2000.0, 500.0)
    assert not speeds.live_is_faster
    assert str(speeds) == "2000.00 ms an image live, 500.00 ms from host memory"


@pytest.mark.parametrize(("workers", "cache", "ahead"), [(0, "none", 0), (2, "none", 4), (2, "memory", 0)])
def test_how_many_batches_a_loader_prefetches(workers: int, cache: Any, ahead: int) -> None:
    """What is kept in memory needs no workers but to fill it."""
    loader = EvalBatches(SPLIT, ImageTransform(16, "bilinear", "squash"), 2, workers=workers, cache=cache)
    assert loader.ahead == ahead
    loader.use(CachedBatches(StreamCache(StreamOutput(torch.zeros(11, 16)), np.ones(11, bool)), SPLIT.labels, set()))
    assert loader.ahead == 0


def test_a_loader_of_this_package_is_measured() -> None:
    speeds = measure(make_backbone(), SPEC, batches(), CPU)
    assert speeds.live > 0
    assert speeds.host > 0


@pytest.mark.parametrize(
    ("asked", "live", "location"), [("auto", 0.1, "live"), ("auto", 9.0, "cached"), ("memory", 0.1, "cached")]
)
def test_auto_prefers_what_is_faster(asked: str, live: float, location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory against live, where nothing fits on the GPU, which is played by the meta device."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * GIB))
    monkeypatch.setattr(placement, "measure", lambda *_: Speeds(live, 1.0))
    monkeypatch.setattr(placement, "fill", lambda *_: StreamCache(StreamOutput(torch.zeros(11, 16)), np.ones(11, bool)))
    accelerator = RankAccelerator(cpu=True)
    monkeypatch.setattr(RankAccelerator, "device", torch.device("cuda"))
    monkeypatch.setattr(placement, "raise_on_any_rank", lambda *_: None)
    monkeypatch.setattr(placement, "broadcast_object_list", lambda chosen: chosen)
    data = SimpleNamespace(max_megapixels=100.0, on_decode_error="fail")
    caches, line = open_streams(
        StreamConfig(cache=asked),
        data,  # type: ignore[arg-type]
        make_backbone(),
        (SPEC, SPEC),
        ImageTransform(16, "bilinear", "squash"),
        {"val": (SPLIT, partial(batches))},
        accelerator,
        StopSignal(),
        passes=5,
        step=step_bytes(make_backbone(), SPEC, 2),
    )
    assert line.startswith(f"frozen stream: {location}")
    assert bool(caches) == (location == "cached")
    assert ("ms an image live" in line) == (asked == "auto")

"""Caches of the frozen stream: equal to live, for one process and many, and never trusted blindly."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_vpt.cli.main import main
from dist_vpt.data.loaders import PADDING
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.launch_env import LaunchEnv, detach_from_launcher
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RecipeError, UserError
from dist_vpt.frozen_stream import cache as stream_cache
from dist_vpt.frozen_stream import disk as stream_disk
from dist_vpt.frozen_stream import joined, placement
from dist_vpt.frozen_stream.cache import CachedBatches, StreamCache, fill, nbytes
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.frozen_stream.disk import cache_folder, identity, on_disk
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.frozen_stream.placement import Sharing, choose
from dist_vpt.methods.base import Reader
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training import engine
from dist_vpt.training.accelerator import unsupported_reason
from dist_vpt.training.components import Components, build_components
from tests.forks import FORK, Forks, command
from tests.methods.conftest import make_backbone
from tests.running import ROOT, metrics, pictures, train, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
FAST = ("run.trackers=[]", "train.test=false", "train.eval_batch_size=96")
# 100 images in batches of 30: the last one is smaller.
UNEVEN = (*FAST, "train.epochs=2", "train.batch_size=30", "optim.lr=5")
READERS = {
    "linear": ("method.name=linear",),
    "mlp": ("method.name=mlp", "method.dropout=0.2"),
    "side": ("method.name=side", "method.channels=8"),
    "vqt": ("method.name=vqt", "method.queries=2", "method.dropout=0.1"),
    "combo": ("method.name=combo", "method.width=16", "method.depth=1", "method.dropout=0.1", "optim.lr=0.1"),
    "combo_sum": ("method.name=combo", "method.width=16", "method.depth=1", "method.sum_blocks=true", "optim.lr=0.1"),
    "ladder": ("method.name=ladder", "method.kind=last", "method.dropout=0.1", "optim.lr=0.1"),
    "vqt_projected": ("method.name=vqt", "method.queries=2", "method.dropout=0.1", "method.form=projected"),
}
GIB = 2**30


@dataclass
class Outcome:
    """What a run reports."""

    losses: list[float]  # of every step
    metrics: list[dict[str, Any]]
    live: int  # images that went through the backbone for a batch, not for a cache
    line: str  # of train.log, about the stream
    result: dict[str, Any]


def run(folder: Path, *overrides: str) -> Outcome:
    losses: list[float] = []
    live: list[int] = []
    step = engine.train_step

    def recorded(*args: Any, **kwargs: Any) -> engine.UnreadStep:
        issued = step(*args, **kwargs)
        losses.append(issued.read().loss)
        return issued

    def counted(backbone: Any, images: torch.Tensor, reads: StreamSpec) -> Any:
        live.append(len(images))
        return compute_stream(backbone, images, reads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", recorded)
        patch.setattr(joined, "compute_stream", counted)
        result = train(folder, *overrides)
    line = next(line for line in (folder / "train.log").read_text().splitlines() if "frozen stream" in line)
    return Outcome(losses, metrics(folder), sum(live), line, result)


def assert_equal(found: Outcome, wanted: Outcome, tolerance: float = 0) -> None:
    assert len(wanted.losses) > 1
    """Accuracies go in steps: in bf16, whose rounding depends on a batch's size, one image of val's 200 may change
    sides, which is half a point, or a point of its class's tenth."""
    assert found.losses == pytest.approx(wanted.losses, rel=tolerance, abs=0)
    one, other = scores(found.metrics), scores(wanted.metrics)
    assert one.keys() == other.keys()
    for name, value in one.items():
        step = 0.0 if tolerance < 1e-4 or name.endswith("loss") else 1.0 if name.endswith("per_class") else 0.501
        assert value == pytest.approx(other[name], rel=tolerance, abs=step), name


def scores(lines: list[dict[str, Any]]) -> dict[str, float]:
    """All numbers of metrics.jsonl by name."""
    numbers = ("loss", "top1", "top5", "per_class")
    return {f"{one['split']} {one['epoch']} {name}": one[name] for one in lines for name in numbers if name in one}


def parts_of(*overrides: str) -> Components:
    method = () if any(word.startswith("method.name=") for word in overrides) else ("method.name=vqt",)
    return build_components(load_recipe([], words(Path("nowhere"), *method, *overrides)))


def facts_of(parts: Components, split: str = "train") -> dict[str, Any]:
    assert isinstance(parts.method, Reader)
    return identity(
        parts.splits[split], parts.transform, parts.recipe.data.max_megapixels, parts.method.backbone, parts.method.spec
    )


def cache_of(folder: Path, parts: Components, split: str = "train", stop: StopSignal | None = None) -> StreamCache:
    """The cache of a split below a folder, built or opened."""
    assert isinstance(parts.method, Reader)
    facts = facts_of(parts, split)
    target = cache_folder(str(folder), facts)
    device = torch.device("cpu")
    backbone, batches = parts.method.backbone, partial(parts.evaluation, split)
    return on_disk(target, facts, backbone, parts.method.spec, batches, device, stop or StopSignal())[0]


def in_memory(parts: Components, split: str = "train") -> StreamCache:
    assert isinstance(parts.method, Reader)
    backbone, batches = parts.method.backbone, parts.evaluation(split, 0, 1)
    accelerator = RankAccelerator(cpu=True)
    return fill(
        backbone, parts.method.spec, batches, parts.splits[split], accelerator, torch.device("cpu"), StopSignal()
    )


def tensors(cache: StreamCache) -> list[torch.Tensor]:
    pooled_nD, *fields = cache.kept
    return [pooled_nD, *(each for field in fields for each in field)]


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def two_processes(
    folder: Path, *overrides: str, strategy: str = "ddp", before: Callable[[int], None] = lambda rank: None
) -> list[int | None]:
    """Exit codes of a run on two forked processes, with ``before(rank)`` called first."""
    return command(["train", *words(folder, *overrides)], Path(f"{folder}.txt"), strategy, before).finish()


def message(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    """What a user reads of a run that is refused."""
    capsys.readouterr()
    assert main(["train", *words(folder, *overrides)]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("reader", "precision"),
    [
        *((reader, "fp32") for reader in ("linear", "mlp", "side", "vqt", "combo", "combo_sum", "ladder")),
        ("vqt", "bf16"),
    ],
)
def test_cached_equals_live(reader: str, precision: str, data: tuple[str, ...], tmp_path: Path) -> None:
    """The places hold the same rows to the last bit. Live batches are of other sizes than those that fill a cache, and
    threads may share a matrix product otherwise: equal to the last bit on one thread of a CPU, else to rounding."""
    few = precision == "fp32"  # what one image of val may differ by in bf16 is told of 200
    options = (*data, *UNEVEN) if few else (*UNEVEN, "train.batch_size=300", "optim.lr=0.5")
    options = (*options, *READERS[reader], f"runtime.precision={precision}")
    live = run(tmp_path / "live", *options, "stream.cache=none")
    shown = 100 if reader.startswith("combo") else 0  # before the first step, to measure what it standardizes
    assert live.live == 2 * ((100 + 20) if few else (1000 + 200)) + shown
    assert "live" in live.line
    memory = run(tmp_path / "memory", *options, "stream.cache=memory")
    assert memory.live == shown  # val comes out of the cache too
    assert "in memory" in memory.line
    assert "(train, val)" in memory.line
    assert_equal(memory, live, 1e-6 if precision == "fp32" else 1e-3)
    disk = (*options, "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}")
    for name in ("built", "opened"):
        found = run(tmp_path / name, *disk)
        assert found.live == shown
        assert f"in {tmp_path / 'cache'}" in found.line
        assert_equal(found, memory)
    assert [path.name.split("-")[0] for path in folders(tmp_path / "cache")] == ["train", "val"]


def test_unreadable_images_are_skipped_and_reported_alike(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i % 7 == 3)
    options = (*data, *READERS["linear"], "data.on_decode_error=skip", "train.epochs=2", "run.trackers=[]")
    cache = f"stream.dir={tmp_path / 'cache'}"
    live = run(tmp_path / "live", *options, "stream.cache=none")
    assert 5 < len(live.result["skipped_images"]) < 10
    for name, more in {"memory": (), "disk": (cache,), "again": (cache,)}.items():
        found = run(tmp_path / name, *options, f"stream.cache={'disk' if more else 'memory'}", *more)
        assert_equal(found, live, 1e-6)
        assert found.result["skipped_images"] == live.result["skipped_images"]


def test_what_another_run_has_skipped_stops_one_that_wants_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i in (3, 10))
    options = (*data, *READERS["linear"], "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}", "run.trackers=[]")
    train(tmp_path / "skips", *options, "data.on_decode_error=skip")
    error = message(capsys, tmp_path / "fails", *options)
    assert "made with data.on_decode_error=skip, this stream cache lacks" in error
    assert "replace what is damaged, or remove this folder" in error
    pictures(tmp_path / "data")
    assert train(tmp_path / "whole", *options)["skipped_images"] == []


def test_what_is_augmented_stays_live(
    data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*data, *UNEVEN, *READERS["linear"], "data.augment=fgvc")
    live = run(tmp_path / "live", *options, "stream.cache=none")
    kept = run(tmp_path / "auto", *options, f"stream.dir={tmp_path / 'cache'}")
    assert kept.live == 2 * 100
    assert "in memory" in kept.line
    assert kept.line.endswith("(val)")
    assert_equal(kept, live, 1e-6)
    for place in ("memory", "disk"):
        error = message(capsys, tmp_path / place, *options, f"stream.cache={place}", f"stream.dir={tmp_path / 'cache'}")
        assert f"stream.cache = {place}: data.augment = fgvc changes each image in every epoch" in error
        assert "set stream.cache=auto (which keeps val alone) or data.augment=none" in error
    assert not (tmp_path / "cache").exists()


def test_a_stream_that_is_read_once_is_not_kept(data: tuple[str, ...], tmp_path: Path) -> None:
    once = run(tmp_path / "run", *data, *FAST, *READERS["linear"])
    assert once.live == 100 + 20
    assert "live" in once.line


@pytest.mark.distributed
@pytest.mark.parametrize(("reader", "place"), [("linear", "memory"), ("vqt", "memory"), ("vqt", "disk")])
def test_two_processes_equal_one(data: tuple[str, ...], reader: str, place: str, tmp_path: Path) -> None:
    options = (*data, *FAST, "train.epochs=2", "train.batch_size=12", "optim.lr=0.5", *READERS[reader][:2])
    alone = run(tmp_path / "alone", *options, "stream.cache=none")
    cache = tmp_path / "cache"
    assert two_processes(tmp_path / "two", *options, f"stream.cache={place}", f"stream.dir={cache}") == [0, 0]
    assert scores(metrics(tmp_path / "two")) == pytest.approx(scores(alone.metrics), abs=1e-4)
    log = (tmp_path / "two" / "train.log").read_text()
    assert ("cached in memory for each of 2 processes" if place == "memory" else f"cached in {cache}") in log
    if place == "disk":
        assert len(folders(cache)) == 2
        assert all(map(torch.equal, tensors(cache_of(cache, parts_of(*data))), tensors(in_memory(parts_of(*data)))))


@pytest.mark.distributed
def test_two_processes_with_bf16_and_skipped_images(tmp_path: Path) -> None:
    """All that a cache holds goes between processes while it is filled."""
    data = pictures(tmp_path / "data", broken=lambda i: i % 7 == 3)
    options = (*data, *READERS["vqt"][:2], "data.on_decode_error=skip", "train.epochs=2", "run.trackers=[]")
    options = (*options, "runtime.precision=bf16", "optim.lr=0.002", "train.eval_batch_size=4")
    alone = run(tmp_path / "alone", *options, "stream.cache=memory")
    assert two_processes(tmp_path / "two", *options, "stream.cache=memory") == [0, 0]
    assert scores(metrics(tmp_path / "two")) == pytest.approx(scores(alone.metrics), rel=1e-2)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["skipped_images"] == alone.result["skipped_images"]


@pytest.mark.distributed
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_an_unreadable_image_on_one_process_ends_both(place: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", broken=lambda i: i == 37)
    more = (*data, *READERS["linear"], f"stream.cache={place}", f"stream.dir={tmp_path / 'cache'}")
    assert two_processes(tmp_path / "run", *more) == [2, 2]
    assert "37.png" in json.loads((tmp_path / "run" / "run.json").read_text())["reason"]
    assert not (tmp_path / "cache").exists() or not folders(tmp_path / "cache")


@pytest.mark.distributed
def test_what_goes_wrong_on_one_process_ends_both(data: tuple[str, ...], tmp_path: Path) -> None:
    """A process that is short of memory, and one whose folder cannot be written, while the other one could go on."""

    def short(rank: int) -> None:
        available = rank and 0
        if rank == 1:
            placement.psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=available))

    options = (*data, *UNEVEN, *READERS["linear"])
    assert two_processes(tmp_path / "short", *options, "stream.cache=memory", before=short) == [2, 2]
    assert "0.00 GiB may be used in memory" in json.loads((tmp_path / "short" / "run.json").read_text())["reason"]

    def full(rank: int) -> None:
        if rank == 1:
            stream_disk._open = _disk_full

    disk = ("stream.cache=disk", f"stream.dir={tmp_path / 'cache'}")
    assert two_processes(tmp_path / "full", *options, *disk, before=full) == [2, 2]
    assert "No space left" in json.loads((tmp_path / "full" / "run.json").read_text())["reason"]


@pytest.mark.distributed
def test_several_processes_build_a_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_of(*FAST)
    gate = FORK.Barrier(3)
    build, built = stream_disk._build, tmp_path / "built"

    def counted(*args: Any) -> None:
        with open(built, "a") as file:
            file.write(f"{os.getpid()}\n")
        build(*args)

    def work(rank: int) -> None:
        gate.wait()
        torch.save(tensors(cache_of(tmp_path / "cache", parts)), tmp_path / f"{rank}.pt")

    monkeypatch.setattr(stream_disk, "_build", counted)
    assert Forks(3, work).finish() == [0, 0, 0]
    assert len(built.read_text().splitlines()) == 1
    assert len(folders(tmp_path / "cache")) == 1
    wanted = tensors(in_memory(parts))
    for rank in range(3):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(wanted) == 7
        assert all(map(torch.equal, found, wanted))


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = parts_of(*FAST)
    calls: list[int] = []

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute_stream(*args)

    monkeypatch.setattr(stream_disk, "compute_stream", killed)
    assert Forks(1, lambda rank: cache_of(tmp_path, parts)).finish() == [-signal.SIGKILL]
    assert [path.suffix for path in folders(tmp_path)] == [".tmp"]
    monkeypatch.undo()
    assert all(map(torch.equal, tensors(cache_of(tmp_path, parts)), tensors(in_memory(parts))))
    assert [path.suffix for path in folders(tmp_path)] == [""]


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_stop_signal_while_the_stream_is_computed(
    data: tuple[str, ...], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        *data,
        *FAST,
        *READERS["linear"],
        "train.epochs=2",
        "train.eval_batch_size=20",
        f"stream.cache={place}",
        f"stream.dir={tmp_path / 'cache'}",
    )
    calls: list[int] = []

    def signalled(*args: Any) -> StreamOutput:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return compute_stream(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stream_cache, "compute_stream", signalled)
        patch.setattr(stream_disk, "compute_stream", signalled)
        with pytest.raises(Interrupted, match="stopped while the frozen stream was computed; started again"):
            train(tmp_path / "run", *options)
    assert len(calls) == 2, "the other batches were not computed first"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert place == "memory" or not folders(tmp_path / "cache")
    train(tmp_path / "run", *options, "run.resume=auto")
    assert len(scores(metrics(tmp_path / "run"))) > 0


def test_a_stop_signal_while_another_run_builds_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, looks = parts_of(*FAST), []
    target = cache_folder(str(tmp_path), facts_of(parts))
    with StopSignal() as stop, open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def asked(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 2:
                signal.raise_signal(signal.SIGUSR1)

        monkeypatch.setattr(time, "sleep", asked)
        with pytest.raises(Interrupted, match="stopped while the frozen stream was computed"):
            cache_of(tmp_path, parts, stop=stop)
    assert len(looks) == 2
    assert not folders(tmp_path)


@pytest.fixture(scope="module")
def whole(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the caches of a linear run's train and val."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    train(folder.parent / "run", *data, *FAST, *READERS["linear"], "stream.cache=disk", f"stream.dir={folder}")
    return folder


def truncated(cache: Path) -> None:
    os.truncate(cache / "pooled.bin", 1000)


def flipped(cache: Path) -> None:
    content = bytearray((cache / "pooled.bin").read_bytes())
    content[12345] ^= 1
    (cache / "pooled.bin").write_bytes(content)


def without_array(cache: Path) -> None:
    (cache / "pooled.bin").unlink()


def without_json(cache: Path) -> None:
    (cache / "stream.json").unlink()


def half_json(cache: Path) -> None:
    os.truncate(cache / "stream.json", 100)


def other_json(cache: Path) -> None:
    (cache / "stream.json").write_text('{"facts": [], "checksum": 0}')


def edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        content = json.loads((cache / "stream.json").read_text())
        (content["facts"] if key in content["facts"] else content)[key] = value
        (cache / "stream.json").write_text(json.dumps(content))

    return edit


def of_val(cache: Path) -> None:
    shutil.rmtree(cache)
    val = next(path for path in folders(cache.parent) if path.name.startswith("val"))
    val.rename(cache)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "pooled.bin: damaged stream cache, 1000 bytes where 51200 were written"),
        (flipped, "pooled.bin: damaged stream cache, its checksum differs from stream.json's"),
        (without_array, "pooled.bin: damaged stream cache, 0 bytes where 51200 were written"),
        (without_json, "not a complete stream cache (FileNotFoundError"),
        (half_json, "not a complete stream cache (JSONDecodeError"),
        (other_json, "not a complete stream cache (AttributeError"),
        (edited("unreadable", [5]), "stream.json: damaged stream cache, its content was changed"),
        (edited("format", 0), "stale stream cache, made of something else (format 0, now 2)"),
        (edited("dtype", "torch.float16"), "(dtype 'torch.float16', now 'torch.float32')"),
        (of_val, "split 'val', now 'train'"),
    ],
    ids=["truncated", "flipped", "no array", "no json", "half a json", "another json", "edited", "format", "dtype",
         "renamed"],
)  # fmt: skip
def test_a_damaged_or_stale_cache_is_refused(  # noqa: PLR0917 (fixtures)
    data: tuple[str, ...],
    damage: Callable[[Path], None],
    reason: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caches = tmp_path / "cache"
    shutil.copytree(whole, caches)
    cache = next(path for path in folders(caches) if path.name.startswith("train"))
    damage(cache)
    before = snapshot(caches)
    options = (*data, *FAST, *READERS["linear"], "stream.cache=disk", f"stream.dir={caches}")
    error = message(capsys, tmp_path / "run", *options)
    assert str(cache) in error
    assert reason in error
    assert "remove this folder, and it is built anew" in error
    assert snapshot(caches) == before
    shutil.rmtree(cache)
    train(tmp_path / "run", *options)
    assert (cache / "pooled.bin").read_bytes() == (whole / cache.name / "pooled.bin").read_bytes()


def test_a_run_changes_nothing_in_a_cache(data: tuple[str, ...], whole: Path, tmp_path: Path) -> None:
    for lock in whole.glob("*.lock"):
        lock.unlink()
    before = snapshot(whole)
    train(tmp_path / "run", *data, *UNEVEN, *READERS["linear"], "stream.cache=disk", f"stream.dir={whole}")
    assert snapshot(whole) == before  # no lock either: it may lie where nothing can be written
    cache = cache_of(whole, parts_of(*data, *READERS["linear"]))
    mapped = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if str(whole) in line]
    assert mapped
    assert all(rights.startswith("r--") for rights in mapped)
    del cache
    assert str(whole) not in Path("/proc/self/maps").read_text()


def test_what_makes_another_cache(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    parts = parts_of(*data)
    same = parts_of(*data, "optim.lr=3", "seed=5", "train.batch_size=30", "data.workers=1", "data.cache=memory")
    before = facts_of(parts)
    assert before == facts_of(same)
    other = {
        "split": facts_of(parts, "val"),
        "trainval": facts_of(parts, "trainval"),
        "dtype": facts_of(parts_of(*data, "runtime.precision=bf16")),
        "largest image": facts_of(parts_of(*data, "data.max_megapixels=20")),
        "image size": facts_of(parts_of(*data, "data.image_size=12")),
        "kernel": facts_of(parts_of(*data, "data.interpolation=bilinear")),
        "mean": facts_of(parts_of(*data, "data.mean=[0.4,0.5,0.5]", "data.std=[0.5,0.5,0.5]")),
        "split seed": facts_of(parts_of(*data, "data.split_seed=1")),
        "blocks": facts_of(parts_of(*data, "method.blocks=[0,1]")),
        "method": facts_of(parts_of(*data, "method.name=linear")),
        "tokens of blocks": facts_of(parts_of(*data, "method.name=combo")),
        "their sum": facts_of(parts_of(*data, "method.name=combo", "method.sum_blocks=true")),
        "a sum of others": facts_of(
            parts_of(*data, "method.name=combo", "method.sum_blocks=true", "method.blocks=[0,1]")
        ),
        "attention": facts_of(parts_of(*data, "runtime.attention=eager")),
    }
    labels = replace(parts.splits["train"], given=1 - parts.splits["train"].labels)
    other["labels"] = identity(labels, parts.transform, 178.0, parts.method.backbone, parts.method.spec)  # type: ignore[attr-defined]
    attention: Any = parts.method.backbone.blocks[2].attn
    attention.num_heads *= 2
    other["heads"] = facts_of(parts)
    attention.num_heads //= 2
    with torch.no_grad():
        next(parts.method.backbone.blocks[5].parameters())[0] += 0.5
    other["weights"] = facts_of(parts)
    file = Path(parts.splits["train"].where(3))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    other["image file"] = facts_of(same)
    keys = {json.dumps(facts, sort_keys=True) for facts in (before, *other.values())}
    assert len(keys) == 1 + len(other)
    assert facts_of(parts_of(*data)) == facts_of(same)


def test_arrays_are_known_by_their_pixels() -> None:
    one, two = parts_of(), parts_of()
    assert facts_of(one) == facts_of(two)
    two.splits["train"].read(7)[0, 0] ^= 1  # type: ignore[index,operator]
    assert facts_of(one) != facts_of(two)
    assert facts_of(one, "val") == facts_of(two, "val")


@pytest.mark.parametrize(
    ("recipe", "gpu", "memory", "disk", "place"),
    [
        ({}, 2.0, 2.0, 2.0, "device"),
        ({}, 1.0, 2.0, 2.0, "memory"),
        ({}, 1.0, 1.0, 2.0, "disk"),
        ({}, 1.0, 1.0, 1.0, "none"),
        ({"dir": None}, 1.0, 1.0, 2.0, "none"),
        ({}, None, 2.0, 2.0, "memory"),
        ({}, None, 1.5, 2.0, "memory"),
        ({"cache": "device"}, None, 2.0, 2.0, "memory"),
        ({"cache": "disk"}, 2.0, 2.0, 2.0, "disk"),
        ({"cache": "none"}, 2.0, 2.0, 2.0, "none"),
    ],
)
def test_where_a_stream_goes(  # noqa: PLR0917 (what is free where)
    recipe: dict[str, Any],
    gpu: float | None,
    memory: float,
    disk: float,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 GiB fits into 2 GiB, and into no 1 GiB: the rest is left for others."""
    _free(monkeypatch, memory, disk)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int((gpu or 0) * GIB), 80 * GIB))
    asked = StreamConfig(**{"dir": str(tmp_path / "not" / "there"), **recipe})
    device = torch.device("cpu" if gpu is None else "cuda")
    found, first, line = choose(asked, (int(1.5 * GIB), GIB), device, lambda: GIB)
    assert found == place
    larger = place in ("device", "memory") and {"device": gpu, "memory": memory}[place] == 2.0
    assert first == larger
    if place != "none":
        assert f", {1.5 if larger else 1:.2f} GiB" in line
    assert line.startswith("frozen stream: " + ("live" if place == "none" else "cached "))
    if place == "none" and asked.cache == "auto":
        assert "since the frozen stream takes 1.00 GiB and 0.80 GiB may be used on the accelerator; 0.80 GiB" in line


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, 4.0, 0)
    place, _, line = choose(StreamConfig(), (2 * GIB, GIB), torch.device("cpu"), lambda: GIB, Sharing(4))
    assert place == "none"
    assert "0.80 GiB may be used in memory for each of 4 processes" in line


def test_processes_that_train_alone_share_the_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "5"}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    processes = detach_from_launcher(LaunchEnv.current()).local_world_size
    assert "WORLD_SIZE" not in os.environ
    _free(monkeypatch, 4.0, 0)
    assert (
        choose(StreamConfig(), (2 * GIB, GIB), torch.device("cpu"), lambda: GIB, Sharing(processes or 1))[0] == "none"
    )


def test_a_cache_of_another_node_that_is_seen_late_is_taken(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*data, *UNEVEN, *READERS["linear"], f"stream.dir={tmp_path / 'cache'}", "stream.cache=disk")
    built = run(tmp_path / "built", *options)
    before, exists = folders(tmp_path / "cache"), Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self not in before and exists(self))
    assert_equal(run(tmp_path / "late", *options), built)
    assert folders(tmp_path / "cache") == before
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_files_that_are_there_need_no_space(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*data, *UNEVEN, *READERS["linear"], f"stream.dir={tmp_path / 'cache'}", "data.cache=none")
    _free(monkeypatch, 0, 8.0)
    built = run(tmp_path / "built", *options)
    assert f"in {tmp_path / 'cache'}" in built.line
    _free(monkeypatch, 0, 0)
    assert_equal(run(tmp_path / "opened", *options), built)
    assert_equal(run(tmp_path / "asked", *options, "stream.cache=disk"), built)
    val = next(path for path in folders(tmp_path / "cache") if path.name.startswith("val"))
    val.rename(val.with_name(f".{val.name}.tmp"))  # as a killed build leaves it: the next one reuses its space
    assert_equal(run(tmp_path / "begun", *options), built)


def test_a_cache_that_does_not_fit_is_reported_before_anything_is_computed(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*data, *UNEVEN, *READERS["linear"], f"stream.dir={tmp_path / 'cache'}", "data.cache=none")
    live = run(tmp_path / "none", *options, "stream.cache=none")
    _free(monkeypatch, 0, 0)
    monkeypatch.setattr(stream_cache, "compute_stream", None)
    monkeypatch.setattr(stream_disk, "compute_stream", None)
    for asked, where in {"memory": "in memory", "device": "in memory", "disk": f"in {tmp_path}/cache"}.items():
        error = message(capsys, tmp_path / asked, *options, f"stream.cache={asked}")
        assert f"stream.cache = {asked}: the frozen stream takes 0.00 GiB, and 0.00 GiB may be used {where}; " in error
        assert "stream.cache=auto" in error
    assert not (tmp_path / "cache").exists()
    found = run(tmp_path / "auto", *options)
    assert "live, since the frozen stream takes 0.00 GiB and 0.00 GiB may be used in memory; " in found.line
    assert f"0.00 GiB may be used in {tmp_path}/cache" in found.line
    assert_equal(found, live)


def test_a_disk_that_fills_up(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _disk_full)
    options = (*data, *FAST, *READERS["linear"], "stream.cache=disk", f"stream.dir={tmp_path / 'cache'}")
    error = message(capsys, tmp_path / "run", *options)
    assert "pooled.bin: 0.00 GiB cannot be written there (No space left on device); free space" in error
    assert not folders(tmp_path / "cache")
    monkeypatch.undo()
    train(tmp_path / "run", *options)


def test_a_folder_that_cannot_be_one(data: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    options = (*data, *FAST, *READERS["linear"], "stream.cache=disk", f"stream.dir={tmp_path / 'file'}")
    error = message(capsys, tmp_path / "run", *options)
    assert f"{tmp_path / 'file'}" in error
    assert "choose another stream.dir" in error


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (("method.name=vpt", "stream.cache=memory"), "method.name = vpt changes the image tokens"),
        (("method.name=full", "stream.dir=cache"), "method.name = full changes the image tokens"),
        (("method.name=linear", "stream.cache=disk"), "cache = disk: needs a folder for its files; set stream.dir"),
        (
            ("method.name=linear", "stream.cache=none", "stream.dtype=int8"),
            "dtype = int8 with cache = none: only a cache",
        ),
        (("method.name=linear", "stream.cache=ram"), "stream.cache = 'ram'"),
    ],
)
def test_recipes_that_contradict_themselves(overrides: tuple[str, ...], mistake: str) -> None:
    with pytest.raises(RecipeError, match=mistake):
        load_recipe([], overrides)


def test_padding_has_no_weight() -> None:
    kept = StreamOutput(torch.arange(8.0).view(4, 2), (torch.arange(24.0).view(4, 3, 2),))
    cache = StreamCache(kept, np.array([True, True, False, True]))
    feed = CachedBatches(cache, np.array([5, 6, 7, 8]), {"x.png"})
    first, second = feed([(0, np.array([3, PADDING, 1])), (0, np.array([2, PADDING, PADDING]))])
    assert first["weight"].tolist() == [1, 0, 1]
    assert first["index"].tolist() == [3, PADDING, 1]
    assert first["labels"].tolist() == [8, 0, 6]
    assert torch.equal(first["images"].pooled[[0, 2]], kept.pooled[[3, 1]])
    assert torch.equal(first["images"].normed[0][[0, 2]], kept.normed[0][[3, 1]])
    assert first["images"].key_scales == ()
    assert second["weight"].tolist() == [0, 0, 0]
    assert second["labels"].tolist() == [7, 0, 0]
    assert feed.skipped == {"x.png"}


@pytest.mark.parametrize(
    "reads",
    [
        StreamSpec((0, 2), key_scales=True),
        StreamSpec((0, 2), keys=True),
        StreamSpec((0, 2), pixels=True),
        StreamSpec(pixels=True),
        StreamSpec(states=(0, 1, 3)),
        StreamSpec((1,), states=(2, 3), patches_only=True),
        StreamSpec((1,), states=(0, 2, 3), summed=True),
    ],
    ids=["scales", "keys", "normed and pixels", "pixels", "states", "normed and patches", "normed and a sum"],
)
def test_all_that_is_asked_for_is_kept(reads: StreamSpec, tmp_path: Path) -> None:
    parts = parts_of("data.image_size=16")
    backbone, batches = make_backbone("registers"), partial(parts.evaluation, "val")
    facts = identity(parts.splits["val"], parts.transform, 178.0, backbone, reads)
    memory = fill(
        backbone,
        reads,
        batches(0, 1),
        parts.splits["val"],
        RankAccelerator(cpu=True),
        torch.device("cpu"),
        StopSignal(),
    )
    disk, _ = on_disk(tmp_path / "val-key", facts, backbone, reads, batches, torch.device("cpu"), StopSignal())
    images = torch.cat([batch["images"] for batch in batches(0, 1)])
    wanted = compute_stream(backbone, images, reads)
    for cache in (memory, disk):
        found = cache[torch.arange(200)]
        count = {name: len(numbers) for name, numbers in reads.kept.items()} | {"pixels": int(reads.pixels)}
        assert [len(each) for each in found[1:]] == [count.get(name, 0) for name in StreamOutput._fields[1:]]
        for a, b in zip(tensors(cache), tensors(StreamCache(wanted, np.ones(200, bool))), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", ["memory", "disk"])
def test_pixels_are_not_rounded_to_the_weights_dtype(kept: str, tmp_path: Path) -> None:
    parts = parts_of("method.name=side", "runtime.precision=bf16")
    cache = in_memory(parts, "val") if kept == "memory" else cache_of(tmp_path, parts, "val")
    images = torch.cat([batch["images"] for batch in parts.evaluation("val", 0, 1)]).double()
    backbone = parts.method.backbone
    assert cache.kept.pooled.dtype == backbone.dtype == torch.bfloat16
    exact = (images - backbone.mean.double()) / backbone.std.double()
    assert torch.allclose(cache[torch.arange(200)].pixels[0].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "reader", [("method.blocks=[1,4]",), ("method.name=side",), ("method.name=combo", "method.sum_blocks=true")]
)
def test_the_size_of_a_stream_is_what_it_holds(reader: tuple[str, ...]) -> None:
    parts = parts_of("runtime.precision=bf16", *reader)
    assert isinstance(parts.method, Reader)
    held = sum(tensor.nbytes for tensor in tensors(in_memory(parts, "val")))
    assert held == nbytes(parts.method.backbone, parts.method.spec, 200)


def test_what_zero3_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = unsupported_reason(load_recipe([], ["data.task=digits", *READERS["vqt"]]), "zero3")
    assert re.match(r"method.name = vqt: .* ZeRO-3 .* start with the ddp strategy", refused)
    assert not unsupported_reason(load_recipe([], ["data.task=digits", *READERS["linear"]]), "zero3")
    recipe = StreamConfig(cache="disk", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"ZeRO-3 .* set stream.cache=memory, or start with the ddp strategy"):
        choose(recipe, (0, 0), torch.device("cpu"), lambda: 0, sharded=True)
    _free(monkeypatch, 0, 8.0)
    assert choose(StreamConfig(dir=str(tmp_path)), (1, 1), torch.device("cpu"), lambda: 1, sharded=True)[0] == "none"


@pytest.mark.distributed
def test_zero3(data: tuple[str, ...], tmp_path: Path) -> None:
    """The backbone is sharded; its stream is computed live for what is augmented, and once for val."""
    options = (
        *data,
        *FAST,
        "train.epochs=2",
        "train.batch_size=26",
        "optim.lr=1",
        "method.name=mlp",
        "data.augment=fgvc",
    )
    alone = run(tmp_path / "alone", *options, "stream.cache=none")
    config = json.loads((ROOT / "launch" / "accelerate" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or the demo backbone would stay whole
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    assert two_processes(tmp_path / "two", *options, strategy=str(tmp_path / "zero3.json")) == [0, 0]
    log = (tmp_path / "two" / "train.log").read_text()
    assert "zero3 on 2 x " in log
    assert "cached in memory for each of 2 processes, 0.00 GiB (val)" in log
    assert scores(metrics(tmp_path / "two")) == pytest.approx(scores(alone.metrics), abs=1e-4)


def _free(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float) -> None:
    """Pretend so many GiB are free."""
    monkeypatch.setattr(placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=memory * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk * GIB))


def _disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

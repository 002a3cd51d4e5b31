"""Runs on streamed data: the same numbers after a kill or a stop, and on two processes, as undisturbed on one."""

import io
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.formats import tar_spans
from dist_vpt.training import engine
from tests.data.formats.test_webdataset import pack
from tests.forks import Forks, command
from tests.range_server import Server, serving
from tests.running import SMALLEST, metrics, step_losses, wait_for

pytest.importorskip("aiohttp")
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
KILLED_AT = 14  # of 3 epochs of 10 steps
WAITING_SECONDS = 1.0  # until a training waits for what is read ahead in vain
ENDED_SECONDS = 40.0  # a request is silent for 20 s before it is tried again, four times
OPTIONS = [
    *SMALLEST, "data.format=webdataset", "data.streaming_shuffle=8", "train.epochs=3", "run.save_every=1",
    'data.webdataset.splits={train: "train-{0..1}.tar", val: val.tar, test: test.tar}', "optim.lr=0.01",
    "run.resume=auto",
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """40 images of train in 2 shards, in 20 spans of which 16 fit on the disk at a time."""
    monkeypatch.setattr(tar_spans, "SPAN", 10_000)
    draw = np.random.default_rng(0)

    def shard(count: int) -> bytes:
        members = []
        for i in range(count):
            content = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "PNG")
            members += [(f"{i}.png", content.getvalue()), (f"{i}.cls", b"%d" % (i % 3))]
        return pack(tmp_path / "shard.tar", members).read_bytes()

    with serving() as found:
        for name, count in (("train-0", 20), ("train-1", 20), ("val", 6), ("test", 6)):
            found.put(f"d/{name}.tar", shard(count))
        yield found


def kill_at(step: int) -> Callable[[int], None]:
    def before(rank: int) -> None:
        train_step = engine.train_step

        def killed(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
            if t.step == step - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(t, *args, **kwargs)

        engine.train_step = killed

    return before


Trained = Callable[..., Forks]


@pytest.fixture
def start(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Starts a training in a folder of some name, with a cache folder of another."""

    def begun(
        name: str,
        cache: str,
        *options: str,
        strategy: str = "single",
        before: Any = lambda rank: None,
        room: int = 130_000,
    ) -> Forks:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        own = [f"run.dir={tmp_path / name}", f"data.root={server.address}/d", f"data.streaming_disk_gib={room / 2**30}"]
        return command(["train", *OPTIONS, *own, *options], tmp_path / f"{name}.txt", strategy, before)

    return begun


def trained(forks: Forks, code: int = 0) -> None:
    assert set(forks.finish(120)) == {code}, forks.output[-3000:]


def test_a_killed_run_and_one_on_two_processes(start: Trained, server: Server, tmp_path: Path) -> None:
    trained(start("alone", "cache"))
    trained(start("run", "cache", before=kill_at(KILLED_AT)), code=-signal.SIGKILL)
    trained(start("run", "another", room=150_000))  # another disk, on which nothing has been fetched
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    found, expected = (step_losses(tmp_path / name) for name in ("run", "alone"))
    assert len(expected) == 30
    assert found == expected
    server.sent.clear()
    trained(start("two", "shared", strategy="ddp"))
    assert step_losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    spans = len({sent for sent in server.sent if sent[2] - sent[1] < 20_000})
    assert len(server.sent) < 3 * spans + 20  # both processes share what one of them has fetched


def stopped(forks: Forks, server: Server, seconds: float) -> None:
    """SIGTERM, to all of its processes, for a run whose server has become silent."""
    wait_for(lambda: server.unanswered > 0 or not forks.running, 60)
    time.sleep(seconds)
    for rank in range(len(forks.processes)):
        forks.send(signal.SIGTERM, rank)
    assert set(forks.finish(ENDED_SECONDS)) == {75}, forks.output[-3000:]
    server.silent_after, server.unanswered = None, 0


def test_a_stop_while_the_server_is_silent(start: Trained, server: Server, tmp_path: Path) -> None:
    """It waits for no answer: neither while shards are indexed nor in training, whoever loads images."""
    trained(start("alone", "cache"))
    expected = step_losses(tmp_path / "alone")
    server.silent_after = len(server.sent) + 1
    forks = start("indexed", "another")
    stopped(forks, server, 0)
    assert "stopped while it was waited for" in forks.output
    assert not (tmp_path / "indexed").exists()
    trained(start("indexed", "another"))
    assert step_losses(tmp_path / "indexed") == expected
    for name, workers, strategy in (("own", 0, "single"), ("workers", 2, "single"), ("two", 0, "ddp")):
        shutil.rmtree(tmp_path / "cache" / "dist_vpt" / "pieces")
        server.silent_after = len(server.sent) + 12
        forks = start(name, "cache", f"data.workers={workers}", strategy=strategy)
        stopped(forks, server, WAITING_SECONDS)
        step = re.search(rf"{name}: stopped at step (\d+) ", forks.output)
        assert step is not None, forks.output[-3000:]
        assert 0 < int(step[1]) < 10
        trained(start(name, "cache", strategy=strategy))
        assert f"step {step[1]}" in forks.output.split("resumes it")[-1], forks.output
        assert step_losses(tmp_path / name) == (expected if strategy == "single" else pytest.approx(expected, abs=1e-4))

"""Runs on streamed data: the same numbers after a kill, and on two processes, as undisturbed on one."""

import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_vpt.data.formats import tar_spans
from dist_vpt.training import engine
from tests.data.formats.test_webdataset import pack
from tests.forks import command
from tests.range_server import Server, serving
from tests.running import SMALLEST, metrics, step_losses

pytest.importorskip("aiohttp")
pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
KILLED_AT = 14  # of 3 epochs of 10 steps


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


def test_a_killed_run_and_one_on_two_processes(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *SMALLEST, "data.format=webdataset", f"data.root={server.address}/d", "data.streaming_shuffle=8",
        "train.epochs=3", "run.save_every=1", "optim.lr=0.01",
        'data.webdataset.splits={train: "train-{0..1}.tar", val: val.tar, test: test.tar}', "run.resume=auto",
    ]  # fmt: skip

    def trained(
        name: str,
        cache: str,
        *,
        strategy: str = "single",
        before: Any = lambda rank: None,
        code: int = 0,
        room: int = 130_000,
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        own = [f"run.dir={tmp_path / name}", f"data.streaming_disk_gib={room / 2**30}"]
        forks = command(["train", *options, *own], tmp_path / "log.txt", strategy, before)
        assert set(forks.finish(120)) == {code}, forks.output[-3000:]

    trained("alone", "cache")
    trained("run", "cache", before=kill_at(KILLED_AT), code=-signal.SIGKILL)
    trained("run", "another", room=150_000)  # another disk, on which nothing has been fetched
    assert metrics(tmp_path / "run") == metrics(tmp_path / "alone")
    found, expected = (step_losses(tmp_path / name) for name in ("run", "alone"))
    assert len(expected) == 30
    assert found == expected
    server.sent.clear()
    trained("two", "shared", strategy="ddp")
    assert step_losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    spans = len({sent for sent in server.sent if sent[2] - sent[1] < 20_000})
    assert len(server.sent) < 3 * spans + 20  # both processes share what one of them has fetched

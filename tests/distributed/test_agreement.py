"""Errors and stops of two processes that are read a step late, as on GPUs; here on CPUs, which would read them at once.

One of them fails or is told to stop: both leave at the same step, with what they would have said and saved.
"""

import json
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.data.loaders import TrainBatches
from dist_vpt.errors import DataError
from dist_vpt.training import accelerator, agreement, engine
from tests.forks import Forks, command
from tests.running import metrics, words
from tests.training.test_reads import counted_reads

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
OPTIONS = ("run.trackers=[]", "train.test=false", "train.epochs=2", "run.save_every=1", "optim.lr=0.05")
STEPS, FAILS_AT = 5, 3  # of an epoch; that are done before


def read_late(rank: int) -> None:
    agreement.reads_late = lambda accelerator: accelerator.num_processes > 1


def fail() -> None:
    raise DataError("/images/7.png: the image cannot be read")


def as_it_reads(step: int, call: Callable[[], Any]) -> None:
    """Have this process call something as it reads the images of a step of the first epoch."""
    whole = TrainBatches.epoch

    def epoch(self: TrainBatches, epoch: int, start_step: int = 0) -> Any:
        for number, batches in enumerate(whole(self, epoch, start_step), start=start_step):
            if (epoch, number) == (0, step):
                call()
            yield batches

    TrainBatches.epoch = epoch  # type: ignore[method-assign]


def forked(
    folder: Path, data: tuple[str, ...], before: Callable[[int], Any], *more: str, words_of: str = "train"
) -> Forks:
    return command([words_of, *words(folder, *data, *OPTIONS, *more)], folder.parent / "output.txt", "ddp", before)


@pytest.fixture(scope="module")
def whole(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose flags are read at once, and in which nothing happens."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    forks = forked(folder, data, lambda rank: None)
    assert forks.finish() == [0, 0], forks.output[-3000:]
    return folder


def losses(folder: Path) -> list[tuple[str, float]]:
    return [(line["split"], line["loss"]) for line in metrics(folder)]


def test_nothing_is_read_until_the_next_step_is_issued(whole: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    """But for the first step, of which no process knows yet what a batch looks like."""

    def before(rank: int) -> None:
        read_late(rank)
        step, reads = engine.train_step, list[list[str]]()
        for module in (accelerator, engine):
            module.steps_are_fused = lambda *_: True  # type: ignore[attr-defined]

        def counted(*args: Any, **named: Any) -> Any:
            with ExitStack() as stack:
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                reads.append(stack.enter_context(counted_reads(patch)))
                issued = step(*args, **named)
            (tmp_path / f"reads-{rank}.json").write_text(json.dumps(reads))
            return issued

        engine.train_step = counted

    forks = forked(tmp_path / "run", data, before)
    assert forks.finish() == [0, 0], forks.output[-3000:]
    assert losses(tmp_path / "run") == losses(whole)
    for rank in range(2):
        first, *others = json.loads((tmp_path / f"reads-{rank}.json").read_text())
        assert first == ["tolist"]
        assert others == [[]] * (2 * STEPS - 1)


@pytest.mark.parametrize("at", [FAILS_AT, 0])
def test_an_image_that_one_process_cannot_read(at: int, whole: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    """Reported once; the step that lacks its images, and the one after it, are not saved."""

    def before(rank: int) -> None:
        read_late(rank)
        if rank == 1:
            as_it_reads(at, fail)

    folder = tmp_path / "run"
    forks = forked(folder, data, before)
    assert forks.finish() == [2, 2], forks.output[-3000:]
    assert forks.output.count("error: ") == 1
    assert "process 1 on " in forks.output
    assert "/images/7.png: the image cannot be read" in json.loads((folder / "run.json").read_text())["reason"]
    saved = sorted(path.name for path in (folder / "state").iterdir()) if (folder / "state").is_dir() else []
    assert [int(name.split("-")[1]) for name in saved if name.startswith("step-")][-1:] == ([at] if at else [])
    if at:
        forks = forked(folder, data, read_late, "run.resume=auto")
        assert forks.finish() == [0, 0], forks.output[-3000:]
        assert losses(folder) == losses(whole)


@pytest.mark.parametrize("at", [FAILS_AT, STEPS - 1])
def test_a_stop_request_to_one_process(at: int, whole: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    """Known when the next step is issued, or at the end of the epoch, before val is scored."""

    def before(rank: int) -> None:
        read_late(rank)
        if rank == 1:
            as_it_reads(at, lambda: signal.raise_signal(signal.SIGUSR1))

    folder = tmp_path / "run"
    forks = forked(folder, data, before)
    assert forks.finish() == [75, 75], forks.output[-3000:]
    assert forks.output.count(f"stopped at step {min(at + 2, STEPS)} with its state saved") == 1, forks.output
    forks = forked(folder, data, read_late, "run.resume=auto")
    assert forks.finish() == [0, 0], forks.output[-3000:]
    assert losses(folder) == losses(whole)


def test_trials_that_share_batches(data: tuple[str, ...], tmp_path: Path) -> None:
    """Trained alike; one process fails in the second of two attempts."""
    grid = ("sweep.grid={optim: {lr: [0.1, 0.01], weight_decay: [0.0]}}", "sweep.seeds=[0]")
    more = ("method.name=linear", "sweep.parallelize=batch", "optim.clip_norm=1", *grid)

    def fails(rank: int) -> None:
        read_late(rank)
        if rank == 1:
            as_it_reads(FAILS_AT, fail)

    found = {}
    for name, before, codes in (("now", lambda rank: None, [0, 0]), ("late", read_late, [0, 0]), ("no", fails, [2, 2])):
        folder = tmp_path / name / "sweep"
        folder.parent.mkdir()
        forks = forked(folder, data, before, *more, words_of="sweep")
        assert forks.finish() == codes, forks.output[-3000:]
        if codes == [2, 2]:
            assert forks.output.count("/images/7.png: the image cannot be read") == 1
            continue
        each = [json.loads(path.read_text()) for path in sorted((folder / "trials").glob("*.json"))]
        assert len(each) == 2
        found[name] = [(trial["last"]["train"], trial["last"]["val"]) for trial in each]
    assert found["now"] == found["late"]

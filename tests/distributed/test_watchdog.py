"""One process of several fails, is killed or hangs: all end soon, with the reason of the first, reported by each."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from dist_vpt.cli.main import main
from dist_vpt.data.loaders import TrainBatches
from dist_vpt.distributed import rendezvous, watchdog
from dist_vpt.distributed.failures import Failure
from dist_vpt.distributed.launch_env import ALONE
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.errors import OutOfMemory, RunFolderError
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runs import folder
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training import accelerator as strategy
from dist_vpt.training import step as step_module
from dist_vpt.training.accelerator import init_accelerator
from dist_vpt.training.components import Components
from tests.forks import Forks, command
from tests.running import ROOT, SMALLEST, few_images, words

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
FAILS_AT = 3  # steps that are done before
OPTIONS = ("train.batch_size=100", "train.epochs=30", "run.trackers=[]", "train.test=false")
TIMEOUT = 0.15  # minutes: a healthy process must not be so late, on a busy machine either


def has_a_bug() -> None:
    raise ZeroDivisionError("a bug")


def is_out_of_memory() -> None:
    raise OutOfMemory("memory is not enough; a smaller batch would fit")


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started deaf to it
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)


def hangs() -> None:
    time.sleep(300)


CODES = {has_a_bug: 1, is_out_of_memory: 3, is_killed: -signal.SIGKILL, is_interrupted: 130, hangs: 4}


def before_step(call: Callable[[], Any]) -> None:
    """Have this process call something as it reads the images of a step."""
    whole = TrainBatches.epoch

    def epoch(self: TrainBatches, epoch: int, start_step: int = 0) -> Any:
        for step, batches in enumerate(whole(self, epoch, start_step), start=start_step):
            if step == FAILS_AT:
                call()
            yield batches

    TrainBatches.epoch = epoch  # type: ignore[method-assign]


def forked(strategy: str, folder: Path, before: Callable[[int], None], *overrides: str) -> Forks:
    file = strategy if strategy == "ddp" else str(ROOT / "launch" / "accelerate" / f"{strategy}.json")
    return command(["train", *words(folder, *OPTIONS, *overrides)], folder.parent / "output.txt", file, before)


@pytest.mark.parametrize(
    ("fault", "strategy", "broken"),
    [
        (has_a_bug, "ddp", 0),
        (has_a_bug, "zero3", 1),
        (is_out_of_memory, "ddp", 1),
        (is_out_of_memory, "ddp, silent", 1),
        (is_killed, "ddp", 0),
        (is_killed, "zero2", 1),
        (is_killed, "ddp, silent", 1),
        (is_interrupted, "ddp", 1),
        (hangs, "ddp", 1),
    ],
)
def test_all_end_with_the_reason_of_the_first(
    fault: Callable[[], None], strategy: str, broken: int, tmp_path: Path
) -> None:
    """``silent``: as under NCCL, a sum with a process that is gone does not return."""
    folder, moment = tmp_path / "run", tmp_path / "moment"

    def befalls() -> None:
        moment.touch()
        fault()

    def before(rank: int) -> None:
        watchdog.LEAVE_SECONDS, watchdog.BEAT_SECONDS, watchdog.POLL_SECONDS = 1.0, 0.3, 0.3
        if rank == broken:
            before_step(befalls)
        elif "silent" in strategy:
            before_step(lambda: setattr(Accelerator, "reduce", lambda *_: hangs()))

    patience = [f"run.timeout_minutes={TIMEOUT}"] if fault is hangs else []
    forks = forked(strategy.partition(",")[0], folder, before, *patience)
    codes = forks.finish(90)
    seconds = time.time() - moment.stat().st_mtime
    assert codes[broken] == CODES[fault], forks.output[-3000:]
    # Another exit code than that of a mistake would have a cluster start all again.
    assert codes[1 - broken] == (3 if fault is is_out_of_memory else 4), forks.output[-3000:]
    assert seconds < (60 * TIMEOUT + 20 if fault is hangs else 20)
    expected = {
        has_a_bug: [f"ZeroDivisionError: a bug at step {FAILS_AT}: reading images"],
        is_out_of_memory: ["memory is not enough; a smaller batch would fit"],
        is_killed: ["ended without reporting an error (last seen at "],
        is_interrupted: ["left before the end (by control-C?)"],
        hangs: [
            f"did not join the others for {TIMEOUT} minutes (run.timeout_minutes): ",
            f"it is at step {FAILS_AT}: reading images",
            f"the others wait at step {FAILS_AT}",
        ],
    }
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "failed"
    logs = [folder / "train.log", folder / "logs" / "rank-1.log"]
    reports = [info["reason"], forks.output, *(log.read_text() for log in logs if codes[logs.index(log)] in (1, 3, 4))]
    for text in reports:
        assert all(part in text for part in expected[fault]), text
    assert info["reason"].startswith(f"process {broken} of 2 (pid {forks.processes[broken].pid} on ")
    assert forks.output.count("error: process ") == (1 if broken or fault is not hangs else 2)
    if fault in (has_a_bug, hangs):
        assert f"in {fault.__name__}" in logs[broken].read_text(), "where it failed or hung"


@pytest.mark.parametrize("split", ["batch", "trials"])
def test_processes_that_share_a_sweep(split: str, tmp_path: Path) -> None:
    """Each trial is a run in a folder of its own, within the sweep's."""
    folder = tmp_path / "sweep"
    grid = [f"sweep.parallelize={split}", "sweep.grid={optim: {lr: [0.5, 0.1]}}", "sweep.seeds=[1]"]
    options = words(folder, *grid, "train.batch_size=100", "train.epochs=30", "run.trackers=[]")

    def before(rank: int) -> None:
        watchdog.LEAVE_SECONDS, watchdog.BEAT_SECONDS, watchdog.POLL_SECONDS = 1.0, 0.3, 0.3
        if rank:
            before_step(is_killed)

    forks = command(["sweep", *options], tmp_path / "output.txt", "ddp", before)
    assert forks.finish(90) == [4, -signal.SIGKILL], forks.output[-3000:]
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "failed"
    assert info["reason"].startswith(f"process 1 of 2 (pid {forks.processes[1].pid} on ")
    assert not list((folder / "trials").glob("*.json")), "none of them diverged"


def test_a_launcher_s_stop_because_of_another_process_is_its_failure(tmp_path: Path) -> None:
    """Where trials are shared each process trains alone, and SIGTERM is all that the first one sees of the other."""
    folder = tmp_path / "sweep"
    options = words(folder, "sweep.grid={optim: {lr: [0.5, 0.1]}}", "sweep.seeds=[1]", "train.batch_size=100",
                    "train.epochs=2000", "run.trackers=[]")  # fmt: skip

    def before(rank: int) -> None:
        watchdog.LEAVE_SECONDS = 60.0  # the thread beside the training does not come to end it
        if rank:
            before_step(has_a_bug)

    forks = command(["sweep", *options], tmp_path / "output.txt", "ddp", before)
    forks.processes[1].join(60)
    forks.send(signal.SIGTERM)
    assert forks.finish(60) == [4, 1], forks.output[-3000:]
    info = json.loads((folder / "run.json").read_text())
    assert info["status"] == "failed"
    assert "ZeroDivisionError: a bug" in info["reason"]


def test_a_mistake_is_reported_where_processes_never_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(strategy, "make_accelerator", fails)
    refused = RunFolderError("my own")
    for error in (RuntimeError("gloo: connection closed"), RunFolderError("wandb is not installed")):
        with pytest.raises(RunFolderError, match=r"^my own$"), contextlib.ExitStack() as leaving:
            init_accelerator(load_recipe([]), ALONE, RankStatus(), refused, leaving)
        with pytest.raises(type(error), match=str(error)), contextlib.ExitStack() as leaving:
            init_accelerator(load_recipe([]), ALONE, RankStatus(), None, leaving)


@pytest.mark.parametrize("split", ["batch", "trials"])
def test_a_sweep_that_is_started_again_after_a_kill_watches_its_processes(split: str, tmp_path: Path) -> None:
    """The folder still says that the sweep is running, which the first process has not begun anew."""
    folder = tmp_path / "sweep"
    grid = [
        f"sweep.parallelize={split}",
        "sweep.grid={optim: {lr: [0.5, 0.1]}}",
        "sweep.seeds=[1]",
        "method.name=linear",
    ]
    options = words(folder, *grid, "train.batch_size=100", "train.epochs=30", "run.trackers=[]", "stream.cache=none")
    recipe = load_recipe([], [*options, "run.resume=auto"])
    with RunFolder(folder).acquire(recipe, "sweep"):
        left = (folder / "run.json").read_bytes()
    (folder / "run.json").write_bytes(left)

    def before(rank: int) -> None:
        watchdog.LEAVE_SECONDS, watchdog.BEAT_SECONDS, watchdog.POLL_SECONDS = 1.0, 0.3, 0.3
        if rank:
            before_step(is_killed)
        else:
            time.sleep(3)  # the other one is there first

    forks = command(["sweep", *options], tmp_path / "output.txt", "ddp", before)
    assert forks.finish(90) == [4, -signal.SIGKILL], forks.output[-3000:]
    reason = json.loads((folder / "run.json").read_text())["reason"]
    assert reason.startswith(f"process 1 of 2 (pid {forks.processes[1].pid} on "), reason
    assert "ended without reporting an error" in reason


@pytest.mark.parametrize("call", ["train", "sweep"])
@pytest.mark.parametrize("seen_by", [{0, 1}, {1}], ids=["both", "one"])
def test_a_mistake_that_shows_before_the_rendezvous_is_reported_once(
    call: str, seen_by: set[int], tmp_path: Path
) -> None:
    (tmp_path / "there" / "data").mkdir(parents=True)
    few_images(tmp_path / "there" / "data")

    def before(rank: int) -> None:
        os.chdir(tmp_path if rank in seen_by else tmp_path / "there")  # as on a node without the data

    options = [*SMALLEST, "data.root=data", f"run.dir={tmp_path / 'run'}", "run.trackers=[]"]
    options += ["sweep.parallelize=batch", "sweep.grid={optim: {lr: [0.5, 0.1]}}"] if call == "sweep" else []
    forks = command([call, *options], tmp_path / "output.txt", "ddp", before)
    assert forks.finish(90) == [2, 2], forks.output[-3000:]
    who = "" if 0 in seen_by else f"process 1 on {socket.gethostname()}: "
    assert f"error: {who}data.root 'data': {tmp_path}/data is not a folder" in forks.output
    assert forks.output.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_process_of_the_same_rank_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe([], words(tmp_path / "run"))
    with RunFolder(tmp_path / "run").acquire(recipe):
        (tmp_path / "run" / "ranks").mkdir()
        with open(tmp_path / "run" / "ranks" / "rank-1.json", "w") as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            with (
                pytest.raises(RunFolderError, match="another process 1 of 2 is running in it; wait for the end"),
                watchdog.RankWatchdog(RunFolder(tmp_path / "run"), 1, 2, 1.0, RankStatus()),
            ):
                pytest.fail("it was entered")
            assert (tmp_path / "run" / "ranks" / "rank-1.json").read_text() == ""


def test_a_process_that_does_not_see_the_run_folder_ends_all(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        folder.SEEN_SECONDS = 0.2
        if rank:
            whole = RunFolder.__init__

            def elsewhere(self: RunFolder, path: str | Path) -> None:
                whole(self, path)
                self.recipe = tmp_path / "another machine's" / "recipe.yaml"

            RunFolder.__init__ = elsewhere  # type: ignore[method-assign]

    forks = forked("ddp", tmp_path / "run", before)
    assert forks.finish(60) == [2, 2], forks.output[-3000:]
    assert forks.output.count("error: ") == 1
    here = (
        f"process 1 on {socket.gethostname()}: {tmp_path / 'run'}: no run is seen here, where process 0 has just begun"
    )
    assert here in forks.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def watched(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], Any]) -> list[str]:
    """Process 1 of 2 is in the folder, then something happens to ranks/: with what reasons its thread ends it."""
    ended: list[str] = []
    reasons: list[str] = []
    whole = watchdog.RankWatchdog._end

    def end(self: watchdog.RankWatchdog, failure: Failure) -> None:
        ended.append(failure.reason)
        with contextlib.suppress(SystemExit):
            whole(self, failure)

    def leave(code: int) -> None:  # the thread, in place of the tests' own process
        assert code == 4
        reasons.append(ended[-1])
        raise SystemExit

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(watchdog, "LEAVE_SECONDS", 0.02)
    monkeypatch.setattr(watchdog.RankWatchdog, "_end", end)
    with folder.acquire(load_recipe([], words(folder.path))), watchdog.RankWatchdog(folder, 1, 2, 1.0, RankStatus()):
        then(folder.path / "ranks")
        deadline = time.monotonic() + 5
        while not reasons and time.monotonic() < deadline:
            time.sleep(0.02)
    return reasons


def test_a_process_that_hung_while_its_run_was_started_again_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started_again(ranks: Path) -> None:
        (ranks / "new").write_text("")
        os.replace(ranks / "new", ranks / "rank-1.json")

    reasons = watched(RunFolder(tmp_path / "run"), monkeypatch, started_again)
    assert "its run was started again while it hung" in reasons[0]


def test_a_process_that_cannot_report_its_status_warns_and_still_watches_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = os.open

    def full(path: Any, *args: Any) -> int:
        if Path(path).name == "rank-1.json":
            raise OSError(28, "No space left on device", str(path))
        return whole(path, *args)

    monkeypatch.setattr(watchdog.os, "open", full)
    failure = json.dumps({"rank": 0, "reason": "process 0 of 2: its memory ran out", "exit_code": 4})
    reasons = watched(
        RunFolder(tmp_path / "run"), monkeypatch, lambda ranks: (ranks / "failed.json").write_text(failure)
    )
    assert reasons[0] == "process 0 of 2: its memory ran out"
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "process 1 cannot report its status, and no other process sees its end" in message


def test_a_loss_that_is_not_finite_on_one_process_stops_all(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        if rank == 1:
            whole = step_module.F.cross_entropy
            before_step(lambda: setattr(step_module.F, "cross_entropy", lambda *a, **k: whole(*a, **k) * float("nan")))

    forks = forked("ddp", tmp_path / "run", before)
    assert forks.finish(90) == [3, 3], forks.output[-3000:]
    assert f"the loss is nan at step {FAILS_AT}" in json.loads((tmp_path / "run" / "run.json").read_text())["reason"]
    assert forks.output.count("error: ") == 1


@pytest.mark.parametrize(
    ("rank", "address", "message"),
    [
        (0, "localhost", "{port} (MASTER_ADDR, MASTER_PORT): the port is used by another program"),
        (1, "nix.invalid", "nix.invalid:{port} (MASTER_ADDR, MASTER_PORT): process 1 of 2 cannot resolve nix.invalid"),
        (
            1,
            "localhost",
            "{port} (MASTER_ADDR, MASTER_PORT): process 1 of 2 could not reach process 0 there within 0.01 minutes",
        ),
    ],
)
def test_a_rendezvous_that_fails(rank: int, address: str, message: str, tmp_path: Path) -> None:
    """The port is another program's, which takes connections and says nothing."""
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]

        def work(_: int) -> int:
            os.environ.update(RANK=f"{rank}", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR=address)
            os.environ.update(MASTER_PORT=f"{port}", ACCELERATE_USE_CPU="true")
            rendezvous.MARGIN_SECONDS = strategy.MARGIN_SECONDS = 0.5
            return main(["train", *words(tmp_path / "run", "run.timeout_minutes=0.01")])

        forks = Forks(1, work, tmp_path / "output.txt")
        assert forks.finish(60) == [2], forks.output
    assert message.format(port=port) in forks.output
    assert forks.output.count("error: ") == 1
    assert "Traceback" not in forks.output
    assert not (tmp_path / "run").exists()


def test_a_worker_that_is_killed_on_one_process_is_reported_by_all(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        whole, loader_options = TrainBatches.epoch, Components.loader_options
        if rank == 0:  # workers take long to start
            Components.loader_options = lambda *a: loader_options(*a) | {"workers": 0}  # type: ignore[method-assign]

        def epoch(self: TrainBatches, epoch: int, start_step: int = 0) -> Any:
            for step, batches in enumerate(whole(self, epoch, start_step)):
                if rank == 1 and step == FAILS_AT:
                    self._source._pool._loader._iterator._workers[0].kill()  # type: ignore[attr-defined]
                yield batches

        TrainBatches.epoch = epoch  # type: ignore[method-assign]

    forks = forked("ddp", tmp_path / "run", before, "data.workers=1", "data.cache=none")
    assert forks.finish(90) == [2, 2], forks.output[-3000:]
    reason = json.loads((tmp_path / "run" / "run.json").read_text())["reason"]
    assert re.search(r"died while it read digits record \d+ \(by SIGKILL\)", reason), reason
    assert forks.output.count("error: ") == 1

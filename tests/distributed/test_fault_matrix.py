"""Signals, kills, a full disk and damaged states, one after the other in one run: it ends as if nothing had happened.

Each strategy's run on two processes gets every kind of fault REPEATS times: between two steps, within a save, on
either process, at steps drawn from a seed. After each one the same command resumes.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.runs import state
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import checkpointing, engine
from tests.forks import Forks, command
from tests.running import ROOT, SMALLEST, few_images, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
STRATEGIES = ("ddp", "zero2", "zero3")
STOPS = ("SIGTERM", "SIGUSR1", "kill one", "kill all")  # what ends a session of the run
OTHERS = ("full disk", "damaged state")  # within a session, and after one
REPEATS = 3
IN_A_SAVE = ("tensors", "marker", "rename", "prune")  # on main; the other process waits for it
OPTIONS = (
    *SMALLEST, "optim.name=adamw", "optim.lr=0.02", "train.epochs=9", "train.test=false", "run.save_every=2",
    "run.trackers=[]", "run.resume=auto", "runtime.deterministic=true",
)  # fmt: skip


@dataclass
class Fault:
    """A fault to inject into a process, at one point of the first step, or the first save, from step ``at`` on."""

    at: int
    point: str  # "step", one of IN_A_SAVE, or "waiting": for main to have saved
    act: Callable[[], None]
    times: int = 1


@dataclass
class Session:
    """The run from a state on to a fault that ends it."""

    stop: str
    full_disk: bool
    damaged_after: bool
    faults: tuple[list[Fault], list[Fault]] = field(default_factory=lambda: ([], []))  # of the two processes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_images(tmp_path_factory.mktemp("data"))


def sessions(strategy: str) -> Iterator[Session]:
    """Every kind of fault REPEATS times, in an order and at points drawn from the strategy's name."""
    draw = random.Random(strategy)
    stops = [stop for stop in STOPS for _ in range(REPEATS)]
    draw.shuffle(stops)
    full = draw.sample(range(len(stops)), REPEATS)
    damaged = draw.sample(range(2, len(stops)), REPEATS)  # when there are two states
    for number, stop in enumerate(stops):
        yield Session(stop, number in full, number in damaged)


def prepared(session: Session, at: int, draw: random.Random, barrier: Path) -> Session:
    """The session with its faults from step ``at`` on."""
    main, other = session.faults
    if session.full_disk:
        main.append(Fault(at, draw.choice(("tensors", "marker", "rename")), no_space))
        at += 2  # steps between saves
    at += draw.randrange(3)
    point = draw.choice(("step", *IN_A_SAVE))
    if session.stop.startswith("SIG"):
        number = getattr(signal, session.stop)
        fault = Fault(at, point, lambda: signal.raise_signal(number))
        (main if point != "step" or draw.random() < 0.5 else other).append(fault)
    elif session.stop == "kill one":
        if draw.random() < 0.5:
            main.append(Fault(at, point, kill_me))
        else:
            other.append(Fault(at, "step" if point == "step" else "waiting", kill_me))
    else:
        main.append(Fault(at, point, lambda: die_together(barrier, 0)))
        other.append(Fault(at, "step" if point == "step" else "waiting", lambda: die_together(barrier, 1)))
    return session


def no_space() -> None:
    raise OSError(28, "No space left on device")


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_together(barrier: Path, rank: int) -> None:
    """Wait for the other process to get here, so that neither dies of the other's death."""
    (barrier / str(rank)).touch()
    while not (barrier / str(1 - rank)).exists():
        time.sleep(0.005)
    kill_me()


def injecting(session: Session) -> Callable[[int], None]:
    """Inject the faults of a process at their points; called in the process itself."""

    def before(rank: int) -> None:
        faults, now = session.faults[rank], -1

        def at(point: str) -> None:
            for fault in faults:
                if fault.point == point and now >= fault.at and fault.times:
                    fault.times -= 1
                    fault.act()

        def with_faults(original: Callable[..., Any], point: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if point == "tensors" and any(s.point == point and now >= s.at and s.times for s in faults):
                    args[1].write_bytes(b"half a file")
                at(point)
                return original(*args, **kwargs)

            return call

        train_step = engine.train_step

        def step(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
            nonlocal now
            now = t.step
            at("step")
            return train_step(t, *args, **kwargs)

        engine.train_step = step
        state.save_file = with_faults(state.save_file, "tensors")
        state.write_atomically = with_faults(state.write_atomically, "marker")
        state.os = PatchedModule(os, replace=with_faults(os.replace, "rename"))
        state.shutil = PatchedModule(shutil, rmtree=with_faults(shutil.rmtree, "prune"))
        if rank == 1:
            checkpointing.broadcast_object_list = with_faults(checkpointing.broadcast_object_list, "waiting")

    return before


class PatchedModule:
    """A module with some of its functions replaced, for one importer alone."""

    def __init__(self, module: Any, **replaced: Callable[..., Any]):
        self.__dict__.update(vars(module) | replaced)


def damage(state: Path, draw: random.Random) -> None:
    """The newest state loses or changes something."""
    file = state / draw.choice(("tensors.safetensors", "state.json"))
    content = bytearray(file.read_bytes())
    how = draw.choice(("cut", "gone", "changed"))
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)


def states(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("step-*"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_ends_as_if_nothing_had_happened(strategy: str, images: Path, tmp_path: Path) -> None:
    file = "ddp" if strategy == "ddp" else str(ROOT / "launch" / "accelerate" / f"{strategy}.json")

    def run(name: str, session: Session | None, number: int) -> Forks:
        argv = ["train", *OPTIONS, f"data.root={images}", f"run.dir={tmp_path / name}"]
        before = injecting(session) if session is not None else lambda rank: None
        return command(argv, tmp_path / f"{name}-{number}.txt", file, before)

    whole = run("whole", None, 0)
    folder, draw, injected, damaged = tmp_path / "run", random.Random(f"{strategy} points"), [], 0
    assert whole.finish(120) == [0, 0], whole.output[-3000:]
    planned = list(sessions(strategy))
    for number, session in enumerate(planned):
        (barrier := tmp_path / f"barrier-{number}").mkdir()
        began = int(states(folder)[-1].name[5:]) if states(folder) else 0
        attempt = run("run", prepared(session, began + 1 - damaged, draw, barrier), number)
        codes = attempt.finish(120)
        report = f"{strategy} {number} {session}: {codes}\n{attempt.output[-3000:]}"
        injected.append(session.stop)
        if session.stop.startswith("SIG"):
            assert codes == [75, 75], report
            assert "stopped at step" in attempt.output, report
        elif session.stop == "kill all":
            assert codes == [-signal.SIGKILL] * 2, report
        else:
            assert codes.count(-signal.SIGKILL) == 1, report
            assert 0 not in codes, report
        assert ("is damaged" in attempt.output) == bool(damaged), report
        assert ("could not be saved (" in attempt.output) == session.full_disk, report
        injected += ["full disk"] * session.full_disk
        assert not (folder / "result.json").exists(), report
        damaged = 0
        if session.damaged_after:
            damage(states(folder)[-1], draw)
            injected.append("damaged state")
            damaged = 1
    last = run("run", None, len(planned))
    assert last.finish(120) == [0, 0], last.output[-3000:]
    assert ("is damaged" in last.output) == bool(damaged)
    assert sorted(injected) == sorted((*STOPS, *OTHERS) * REPEATS)
    assert len(injected) * len(STRATEGIES) >= 50
    print(f"{strategy}: {len(planned) + 2} runs of two processes, {len(injected)} faults")
    assert_alike(tmp_path / "whole", folder, exactly=strategy == "ddp")
    left = {path.name for path in (folder / "state").iterdir() if not path.name.startswith("damaged-")}
    assert left == {path.name for path in (tmp_path / "whole" / "state").iterdir()}


def assert_alike(whole: Path, folder: Path, exactly: bool) -> None:
    """Losses and scores of every epoch, and what was trained: to the last bit, or to 1e-6."""
    assert len(metrics(folder)) == len(metrics(whole))
    for one, other in zip(metrics(whole), metrics(folder), strict=True):
        assert other == (one if exactly else pytest.approx(one, abs=1e-6))
    for name in ("adapters.safetensors", "best.safetensors"):
        (found, facts), (expected, expected_facts) = read_adapters(folder / name), read_adapters(whole / name)
        assert found.keys() == expected.keys()
        assert facts["epoch"] == expected_facts["epoch"]
        for key, tensor in found.items():
            assert float((tensor - expected[key]).abs().max()) <= (0 if exactly else 1e-6), (name, key)
    results = [json.loads((run / "result.json").read_text()) for run in (whole, folder)]
    assert results[0]["best"]["epoch"] == results[1]["best"]["epoch"]

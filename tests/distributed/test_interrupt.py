"""Ctrl-C, as a terminal sends it: SIGINT to all processes of a command, loader workers and launchers included."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.distributed.signals import SAME_SECONDS, StopSignal
from dist_vpt.errors import Interrupted
from dist_vpt.files import read_json
from dist_vpt.runs.adapters import read_adapters
from tests.running import ROOT, finish, metrics, train, wait_for, words

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
OPTIONS = ("train.epochs=2", "train.eval_batch_size=8", "run.trackers=[]")
HEARING = ("env", "--default-signal=INT")  # what is started in the background, as tests may be, is deaf to it
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture(scope="module")
def whole(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *data, *OPTIONS)
    return folder


def paused(moment: str, folder: Path, *argv: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A command in a process group of its own, once it waits at a moment."""
    marker = folder.parent / "waits"
    command = [*HEARING, sys.executable, *launch, "-m", "tests.distributed.pausing", moment, str(marker), *argv]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({"ACCELERATE_USE_CPU": "true"} if launch else {})
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    waiting = [marker.with_name(f"waits-{rank}") for rank in range(2 if launch else 1)]
    wait_for(lambda: all(path.exists() for path in waiting) or process.poll() is not None)
    if process.poll() is not None:
        pytest.fail(finish(process))
    return process


def tensors(path: Path) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in read_adapters(path)[0].items()}


@pytest.mark.parametrize(
    ("moment", "workers", "message"),
    [
        ("start", 0, "stopped at step 1 with its state saved; run.resume=auto resumes it"),
        ("step", 2, "stopped at step 8 with its state saved; run.resume=auto resumes it"),
        ("save", 0, "stopped at step 6 with its state saved; run.resume=auto resumes it"),
        ("val", 2, "stopped at step 5, while val was scored, with its state saved; run.resume=auto resumes it"),
        ("test", 2, "stopped while scoring a split; run.resume=auto resumes from the newest state"),
    ],
)
def test_a_run_is_saved_and_resumed(  # noqa: PLR0917 (fixtures)
    moment: str, workers: int, message: str, whole: Path, data: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = (*data, *OPTIONS, f"data.workers={workers}")
    process = paused(moment, folder, "train", *words(folder, *options))
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert process.returncode == Interrupted.BY_KEYBOARD, output
    assert message in output
    assert "press Ctrl-C again to end at once" in output
    assert "Traceback" not in output
    assert read_json(folder / "run.json")["status"] == "interrupted"
    result = train(folder, *data, *OPTIONS, "run.resume=auto")
    assert metrics(folder) == metrics(whole)
    assert tensors(folder / "adapters.safetensors") == tensors(whole / "adapters.safetensors")
    assert result["last"] == json.loads((whole / "result.json").read_text())["last"]


@pytest.mark.distributed
def test_two_processes_and_their_launcher(whole: Path, data: tuple[str, ...], tmp_path: Path) -> None:
    """The launcher sends the signal on, and each process gets it twice within a moment."""
    folder = tmp_path / "run"
    launch = (*LAUNCH, "--config_file", "launch/accelerate/ddp.yaml")
    options = (*data, *OPTIONS, "data.workers=1")
    process = paused("step", folder, "train", *words(folder, *options), launch=launch)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert "stopped at step 8 with its state saved; run.resume=auto resumes it" in output
    assert output.count("press Ctrl-C again") == 1
    assert read_json(folder / "run.json")["status"] == "interrupted"
    train(folder, *data, *OPTIONS, "run.resume=auto")
    for one, other in zip(metrics(folder), metrics(whole), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_second_time_ends_at_once(data: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = paused("forever", folder, "train", *words(folder, *data, *OPTIONS, "data.workers=2"))
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(SAME_SECONDS + 0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, seconds=20)
    assert process.returncode == Interrupted.BY_KEYBOARD, output
    assert output.rstrip().endswith("interrupted")
    assert "Traceback" not in output
    assert read_json(folder / "run.json")["status"] == "interrupted"


def test_a_suite_of_two_workers(tmp_path: Path) -> None:
    """The command and its workers each get it, and the command sends it on to them."""
    folder = tmp_path / "suite"
    grid = (
        "sweep.grid={optim: {lr: [0.1, 0.05]}}",
        "sweep.seeds=[1]",
        "train.epochs=2",
        "run.trackers=[]",
        "data.fraction=0.2",
    )
    argv = (
        "suite",
        "backbone.name=demo",
        *grid,
        "data.workers=0",
        "--tasks",
        "digits",
        "--method",
        "vpt_shallow",
        "--workers",
        "2",
    )
    argv += ("--out", str(folder))
    command = [*HEARING, sys.executable, "-m", "dist_vpt", *argv]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    wait_for(lambda: list(folder.glob("*/*/trials/*/metrics.jsonl")) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert process.returncode == Interrupted.BY_KEYBOARD, output
    assert "the same command resumes" in output
    assert "Traceback" not in output
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert again.returncode == 0


def test_a_thread_gets_no_signals() -> None:
    """As a run in a thread of a notebook or a server."""
    found: list[bool] = []

    def work() -> None:
        with StopSignal() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_in_python_it_raises_interrupted(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's interrupt is a SIGINT: the state is saved, and the cell ends with a message on how to resume."""
    from dist_vpt.training import engine

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    step = engine.train_step

    def struck(t: engine.TrainState, *arguments: Any, **more: Any) -> Any:
        if t.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(t, *arguments, **more)

    monkeypatch.setattr(engine, "train_step", struck)
    try:
        with pytest.raises(Interrupted, match="stopped at step 3 with its state saved") as stopped:
            train(tmp_path / "run", *data, *OPTIONS)
        assert stopped.value.exit_code == Interrupted.BY_KEYBOARD
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_probe_between_two_backbones(
    data: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_vpt.cli.main import main
    from dist_vpt.experiments import probe

    begun: list[str] = []

    def swept(probed: Any, method: str, *_: Any) -> dict[str, Any]:
        begun.append(f"{probed.backbone} {method}")
        signal.raise_signal(signal.SIGINT)
        return dict.fromkeys(probe.COLUMNS) | {"backbone": probed.backbone, "method": method, "val_top1": 1.0}

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(probe, "_swept", swept)
    monkeypatch.setattr("dist_vpt.distributed.signals.SAME_SECONDS", 60.0)  # all of them are one Ctrl-C
    try:
        out = tmp_path / "probe"
        small = ("data.image_size=24", "data.workers=0")
        second = tmp_path / "random.yaml"
        second.write_text("backbone: {name: test_vit, weights: random}\n")
        code = main(["probe", *data, *small, "--backbones", f"demo,{second}", "--out", str(out)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == Interrupted.BY_KEYBOARD
    assert f"{out}: stopped; the same command resumes" in capsys.readouterr().err
    assert {name.split()[0] for name in begun} == {"demo"}

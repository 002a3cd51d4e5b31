"""Saved states: whole or not there, the newest two, damaged ones set aside; adapters that prove what they are."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_vpt.errors import Interrupted, RunFailed, RunFolderError, WeightsError
from dist_vpt.methods import attach
from dist_vpt.methods.config import VPTConfig
from dist_vpt.runs import adapters, state
from dist_vpt.runs.adapters import collect, read_adapters, restore, write_adapters
from dist_vpt.training import engine
from tests.forks import command
from tests.methods.conftest import make_backbone
from tests.running import metrics, train, words

pytestmark = pytest.mark.usefixtures("on_the_cpu")
OPTIONS = ("train.batch_size=25", "train.epochs=3", "run.save_every=1", "runtime.deterministic=true")
OPTIONS += ("train.test=false", "run.trackers=[]")


def files(path: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def kill_at(point: str) -> None:
    """Let this process kill itself, as a power cut or the system would, at a point of its fourth save."""
    saves = 0

    def counted(original: Callable[..., Any], when: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal saves
            saves += when == "tensors"
            if saves == 4 and when == point:
                if when == "tensors":
                    args[1].write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    state.save_file = counted(state.save_file, "tensors")
    state.write_atomically = counted(state.write_atomically, "json")
    os.replace = counted(os.replace, "rename")
    shutil.rmtree = counted(shutil.rmtree, "prune")


@pytest.fixture(scope="module")
def stopped(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at its sixth step of twelve, and (as "whole") one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "whole", *data, *OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        signal_at(6, patch)
        with pytest.raises(Interrupted, match="stopped at step 6 with its state saved"):
            train(folder / "run", *data, *OPTIONS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("point", ["tensors", "json", "rename", "prune"])
def test_a_kill_during_a_save_loses_at_most_that_save(
    data: tuple[str, ...], point: str, stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    killed = command(
        ["train", *words(folder, *data, *OPTIONS)], tmp_path / "output.txt", before=lambda rank: kill_at(point)
    )
    assert killed.finish() == [-signal.SIGKILL], killed.output
    names = sorted(path.name for path in (folder / "state").glob("step-*"))
    assert names[-1] in ("step-00000003", "step-00000004")
    assert not (folder / "result.json").exists()
    train(folder, *data, *OPTIONS, "run.resume=auto")
    assert metrics(folder) == metrics(stopped / "whole")
    left = sorted(path.name for path in (folder / "state").iterdir())
    assert left == ["step-00000011", "step-00000012"], "two states and no leavings"


def signal_at(number: int, patch: pytest.MonkeyPatch) -> None:
    step = engine.train_step

    def counted(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        if t.step == number - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(t, *args, **kwargs)

    patch.setattr(engine, "train_step", counted)


def no_space(after: int, times: int, patch: pytest.MonkeyPatch) -> None:
    """So many saves find the disk full, after so many that do not."""
    save, saves = state.save_file, 0

    def full(tensors: Any, path: Path) -> None:
        nonlocal saves
        saves += 1
        if after < saves <= after + times:
            path.write_bytes(b"half a file")
            raise OSError(28, "No space left on device", str(path))
        save(tensors, path)

    patch.setattr(state, "save_file", full)


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("tensors.safetensors", cut, r"tensors.safetensors has [\d,]+ bytes, not [\d,]+"),
        ("tensors.safetensors", changed, "tensors.safetensors is not what was written"),
        ("tensors.safetensors", Path.unlink, "No such file"),
        ("best.safetensors", changed, "best.safetensors is not what was written"),
        ("state.json", cut, "state.json is not what was written"),
        ("state.json", Path.unlink, "No such file"),
        ("state.json", lambda path: path.write_text("{}"), "state.json is not what was written"),
        (
            "state.json",  # another number of images seen, nothing more
            lambda path: path.write_text(path.read_text().replace('"images": 1', '"images": 2')),
            "state.json is not what was written",
        ),
    ],
)
def test_a_damaged_newest_state_is_set_aside_with_a_warning(  # noqa: PLR0917 (fixtures)
    data: tuple[str, ...], file: str, damage: Callable[[Path], Any], reason: str, stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped / "run", folder)
    damage(folder / "state" / "step-00000006" / file)
    before = files(folder / "state" / "step-00000006")
    train(folder, *data, *OPTIONS, "run.resume=auto")
    log = (folder / "train.log").read_text()
    assert re.search(rf"warning: .*step-00000006 is damaged \(.*{reason}", log)
    assert "set aside as damaged-step-00000006; resuming from step-00000005 before it" in log
    assert files(folder / "state" / "damaged-step-00000006") == before
    assert metrics(folder) == metrics(stopped / "whole")


def test_one_more_damaged_state_of_the_same_step_is_kept_too(
    data: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped / "run", folder)
    shutil.copytree(folder / "state" / "step-00000006", folder / "state" / "damaged-step-00000006")
    cut(folder / "state" / "step-00000006" / "state.json")
    train(folder, *data, *OPTIONS, "run.resume=auto")
    assert states(folder)[:2] == ["damaged-step-00000006", "damaged-step-00000006-2"]


def test_when_no_state_is_whole_the_run_says_so_and_leaves_them(
    data: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped / "run", folder)
    for number in (5, 6):
        cut(folder / "state" / f"step-0000000{number}" / "tensors.safetensors")
    before = files(folder / "state")
    for _ in range(2):
        with pytest.raises(RunFolderError, match=r"no state in it is whole: step-00000006: .*; step-00000005: .*; re"):
            train(folder, *data, *OPTIONS, "run.resume=auto")
        assert files(folder / "state") == before


def test_a_full_disk_fails_a_save_and_not_the_run(data: tuple[str, ...], stopped: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        no_space(3, 2, patch)
        train(tmp_path / "run", *data, *OPTIONS)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: the state of step 4 could not be saved ([Errno 28] No space left on device: " in log
    assert log.count("training continues, and would resume from step 3; free space in ") == 2
    assert metrics(tmp_path / "run") == metrics(stopped / "whole")
    assert states(tmp_path / "run") == ["step-00000011", "step-00000012"]


def test_a_disk_that_stays_full_ends_the_run(data: tuple[str, ...], stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_space(3, 100, patch)
        with pytest.raises(RunFailed, match=r"3 states in a row .* free space there, then .* resumes from step 3"):
            train(folder, *data, *OPTIONS)
    assert states(folder) == ["step-00000002", "step-00000003"]
    train(folder, *data, *OPTIONS, "run.resume=auto")
    assert metrics(folder) == metrics(stopped / "whole")


def test_a_signal_on_a_full_disk_stops_the_run_and_says_what_is_lost(
    data: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_space(4, 100, patch)
        signal_at(5, patch)
        with pytest.raises(Interrupted, match=r"stopped at step 5 but its state could not be .* resumes from step 4"):
            train(folder, *data, *OPTIONS)
    assert states(folder) == ["step-00000003", "step-00000004"]
    train(folder, *data, *OPTIONS, "run.resume=auto")
    assert metrics(folder) == metrics(stopped / "whole")


def test_a_full_disk_at_the_end_says_where_the_run_would_go_on(data: tuple[str, ...], tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    once = ("train.batch_size=50", "train.epochs=1", "train.test=false", "run.trackers=[]")
    with pytest.MonkeyPatch.context() as patch:
        no_space(0, 100, patch)
        patch.setattr(adapters, "write_atomically", full)
        with pytest.raises(RunFailed, match=r"results cannot be written .* run.resume=auto resumes from the beginning"):
            train(tmp_path / "run", *data, *once)
    train(tmp_path / "run", *data, *once, "run.resume=auto")


def test_a_resumed_run_may_pay_time_for_memory(data: tuple[str, ...], stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped / "run", folder)
    train(folder, *data, *OPTIONS, "run.resume=auto", "runtime.activation_checkpointing=block")
    assert [line["loss"] for line in metrics(folder)] == pytest.approx(
        [line["loss"] for line in metrics(stopped / "whole")], abs=1e-5
    )


def test_adapters_of_another_method_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vpt = attach(VPTConfig(prompts=2), make_backbone(), 5)
    path = tmp_path / "a.safetensors"
    tensors = collect(vpt)
    write_adapters(path, tensors, {"classes": ["a", "b"]})
    found, facts = read_adapters(path)
    assert facts == {"classes": ["a", "b"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    with pytest.raises(WeightsError, match=r"prompts has shape \(3, 2, 16\), this recipe's \(3, 4, 16\)"):
        restore(attach(VPTConfig(prompts=4), make_backbone(), 5), found, path)
    with pytest.raises(WeightsError, match=r"missing: \['prompts'\]"):
        restore(vpt, {name: tensor for name, tensor in found.items() if name != "prompts"}, path)


def test_damaged_and_missing_adapters(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no adapters here"):
        read_adapters(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(WeightsError, match=r"bad.safetensors: damaged adapters"):
        read_adapters(tmp_path / "bad.safetensors")

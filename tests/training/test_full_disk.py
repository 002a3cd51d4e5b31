"""A disk that is really full, a small tmpfs: it costs saves for a while, and no line, number or earlier state."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.errors import RunFailed
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.training import engine
from tests.running import metrics, train

OPTIONS = ("train.batch_size=250", "train.epochs=3", "run.save_every=1", "runtime.deterministic=true")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An own file system of 3 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def full_between(first: int, last: int, disk: Path, patch: pytest.MonkeyPatch) -> None:
    """Fill the disk before step ``first`` is made, and free it before step ``last``."""
    step, filler = engine.train_step, disk / "filler"

    def disturbed(t: engine.TrainState, *args: Any, **kwargs: Any) -> engine.UnreadStep:
        if t.step == first:
            with suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))
        if t.step == last:
            filler.unlink()
        return step(t, *args, **kwargs)

    patch.setattr(engine, "train_step", disturbed)


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's: no traceback
def test_a_disk_that_is_full_for_a_while_and_at_the_end(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = train(tmp_path / "whole", *OPTIONS), disk / "run"
    with pytest.MonkeyPatch.context() as patch:
        full_between(6, 8, disk, patch)  # over the end of an epoch: its metrics, its best adapters, two states
        found = train(folder, *OPTIONS)
    assert (found["last"], found["best"]) == (whole["last"], whole["best"])
    assert_whole(folder, tmp_path / "whole")
    log = (folder / "train.log").read_text()
    for number in (7, 8):
        assert re.search(rf"warning: the state of step {number} could not be saved \(.*No space left on device", log)
    assert [int(n) for n in re.findall(r"  step (\d+)/12", log)] == list(range(1, 13)), "no line of the log is lost"

    folder = disk / "other"
    with pytest.MonkeyPatch.context() as patch:
        full_between(10, 100, disk, patch)
        with pytest.raises(RunFailed, match=r"results cannot be written \(.*No space left.* resumes from step 10"):
            train(folder, *OPTIONS)
    assert not (folder / "result.json").exists()
    assert capsys.readouterr().out.count("warning: TensorBoard stopped writing to") == 1
    (disk / "filler").unlink()
    found = train(folder, *OPTIONS, "run.resume=auto")
    assert (found["last"], found["best"]) == (whole["last"], whole["best"])
    assert_whole(folder, tmp_path / "whole")


def assert_whole(folder: Path, whole: Path) -> None:
    assert metrics(folder) == metrics(whole)
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    for name in ("adapters.safetensors", "best.safetensors"):
        found_tensors, whole_tensors = (read_adapters(run / name)[0] for run in (folder, whole))
        assert all(found_tensors[key].equal(tensor) for key, tensor in whole_tensors.items())
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["step-00000011", "step-00000012"]

"""Images of val and test that cannot be read: what was trained is kept, and the message says how to go on."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_vpt.cli.main import main
from dist_vpt.errors import DataError
from tests.running import TINY, few_digits, metrics, train

VAL, TEST = 110, 130  # images of few_digits


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    return (*few_digits(tmp_path / "data"), "run.trackers=[]", "train.epochs=2")


def cut(tmp_path: Path, image: int) -> None:
    path = tmp_path / f"data/{image}.png"
    path.write_bytes(path.read_bytes()[:60])


def test_in_test_the_training_is_done_and_kept(tmp_path: Path, data: tuple[str, ...]) -> None:
    cut(tmp_path, TEST)
    run = tmp_path / "run"
    kept = f"the training is done and kept in {run}: run.resume=auto scores test alone"
    with pytest.raises(DataError, match=rf"{TEST}\.png: the image cannot be read .*on_decode_error=skip; {kept}$"):
        train(run, *data)
    trained = load_file(run / "adapters.safetensors")
    again = train(run, *data, "run.resume=auto", "data.on_decode_error=skip")
    assert again["last"]["test"]["top1"] >= 0
    assert again["skipped_images"] == [str(tmp_path / f"data/{TEST}.png")]
    kept_on = load_file(run / "adapters.safetensors")
    assert all(torch.equal(tensor, kept_on[name]) for name, tensor in trained.items())
    assert [line["split"] for line in metrics(run)] == [*("train", "val") * 2, "test"]  # no epoch a second time


def test_in_val_the_epoch_is_kept(tmp_path: Path, data: tuple[str, ...]) -> None:
    cut(tmp_path, VAL)
    run = tmp_path / "run"
    stopped = f"{run}: stopped at step 5, while val was scored, with its state saved; run.resume=auto resumes it"
    for resume in ((), ("run.resume=auto",)):  # left as it is, it stops there again
        with pytest.raises(DataError, match=rf"{VAL}\.png: the image cannot be read .*skip\n{re.escape(stopped)}$"):
            train(run, *data, *resume)
    result = train(run, *data, "run.resume=auto", "data.on_decode_error=skip")
    assert result["skipped_images"] == [str(tmp_path / f"data/{VAL}.png")]
    whole = train(tmp_path / "whole", *data, "data.on_decode_error=skip")
    assert result["last"] == whole["last"]


def test_in_a_sweeps_test_its_trials_are_kept(
    tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    cut(tmp_path, TEST)
    words = ["sweep", *TINY, *data, "method.name=linear", "sweep.grid={optim.lr: [0.1]}", "sweep.seeds=[1,2]"]
    words.append(f"run.dir={tmp_path / 'sweep'}")
    assert main(words) == 2
    assert "these trials are trained and kept: the same command scores test alone" in capsys.readouterr().err
    assert main([*words, "data.on_decode_error=skip"]) == 0
    output = capsys.readouterr().out
    assert "without 1 images that cannot be read" in output
    assert "epoch 1/2" not in output.split("seed=1 to seed=2")[1]  # none is trained again

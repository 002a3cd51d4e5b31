"""Readers of several backbones on two processes."""

import json
from pathlib import Path

import pytest
import torch

from dist_vpt.inference.evaluate import evaluate_run
from dist_vpt.runs.adapters import read_adapters
from tests.distributed.test_two_processes import forked
from tests.running import step_losses, train

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("on_the_cpu")]
SEVERAL = "backbones=[{name: demo, image_size: 16}, {name: test_vit, weights: random, image_size: 32}]"
COMBO = ("method.name=combo", "method.width=16", "method.depth=1", "method.group_penalty=0.3", "optim.lr=0.02")
LINEAR = ("method.name=linear", "optim.lr=0.2")
# 100 images in batches of 12: the ninth is smaller and shared unevenly. sgd: Adam would make steps of noise.
UNEVEN = ("train.epochs=2", "train.batch_size=12", "optim.scale_lr=false", "optim.clip_norm=1")
CASES = [
    ("ddp", (*COMBO, "train.grad_accum_steps=2")),
    ("zero2", COMBO),
    ("zero2", LINEAR),
    ("zero3", LINEAR),
    ("zero3_all", (*LINEAR, "method.reads=blocks")),
]


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize(("strategy", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_two_processes_equal_one(
    strategy: str, settings: tuple[str, ...], cache: str, data: tuple[str, ...], tmp_path: Path
) -> None:
    options = (*data, *UNEVEN, *settings, SEVERAL)
    result = train(tmp_path / "one", *options, "stream.cache=none", "train.grad_accum_steps=1")
    forks = forked(strategy, tmp_path / "two", *options, f"stream.cache={cache}")
    assert forks.finish() == [0, 0], forks.output[-3000:]
    assert step_losses(tmp_path / "two") == pytest.approx(step_losses(tmp_path / "one"), abs=1e-4)
    ours, theirs = (read_adapters(tmp_path / name / "adapters.safetensors")[0] for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-4), name
    facts = json.loads((tmp_path / "two" / "result.json").read_text())
    assert (facts["strategy"], facts["processes"]) == (strategy.removesuffix("_all"), 2)
    assert evaluate_run(str(tmp_path / "two"), "test", "last")["loss"] == pytest.approx(
        result["last"]["test"]["loss"], abs=1e-4
    )


def test_zero3_does_not_gather_the_layers_of_combo(tmp_path: Path) -> None:
    forks = forked("zero3", tmp_path / "run", *COMBO, SEVERAL)
    assert forks.finish() == [2, 2]
    message = "method.name = combo: computes with its trained layers of all trials at once"
    assert forks.output.count(message) == 1, forks.output[-3000:]

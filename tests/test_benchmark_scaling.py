"""benchmarks/traffic.py and scaling.py: what processes send, counted, and the model of step times on paper.

W processes, P prompts, D width, L blocks, K classes.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_vpt.recipe import load_recipe
from tests.forks import launched
from tests.running import ROOT

pytestmark = pytest.mark.usefixtures("on_the_cpu")
D, L, K, P = 768, 12, 100, 50  # VPT-deep on ViT-B/16
GRADIENTS = 4 * (L * P * D + K * (D + 1))  # bytes
# What is exchanged does not depend on the size of the images, and small ones are quick.
VIT_B = ["backbone.name=vit_base_patch16_224", "backbone.weights=random", "data.image_size=32", "train.batch_size=2"]
VPT = ["method.name=vpt", f"method.prompts={P}"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


traffic = script("traffic")


def measured(strategy: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What each of two processes says of one step."""
    file = ROOT / "launch" / "accelerate" / f"{strategy}.json"
    if strategy == "zero0":
        file = folder / "zero0.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))

    def work(rank: int) -> int:
        found = traffic.measure(load_recipe([], list(words)), classes=K, repeats=0)
        (folder / f"{rank}.json").write_text(json.dumps(found))
        return 0

    forks = launched(work, folder / "told.txt", "ddp" if strategy == "ddp" else str(file))
    assert forks.finish() == [0, 0], forks.output[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero0", "zero1", "zero2"])
def test_processes_exchange_the_gradients_of_what_trains_and_no_more(strategy: str, tmp_path: Path) -> None:
    """In bytes of each of two: 2 (W - 1) / W of the gradients, which an all-reduce sends, and a reduce-scatter with an
    all-gather too. Before the first step, what trains is broadcast, and nothing that is frozen."""
    for found in measured(strategy, tmp_path, *VIT_B, *VPT):
        assert found["strategy"] == strategy
        assert found["gradient_bytes"] == GRADIENTS == 2_150_800
        assert GRADIENTS <= found["step_bytes"] < 1.001 * GRADIENTS
        assert found["start_bytes"] < 1.05 * GRADIENTS / 2
        # gloo reduces by a reduce-scatter and a gather: half of each reduced half once more than it need be.
        reduced = 0.25 if strategy in {"zero1", "zero2"} else 0
        if found["wire_bytes"] is not None:
            assert found["wire_bytes"] == pytest.approx((1 + reduced) * GRADIENTS, rel=0.01)

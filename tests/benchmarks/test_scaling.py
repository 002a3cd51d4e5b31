"""benchmarks/traffic.py and scaling.py: what processes send, counted, and the model of step times on paper.

W processes, P prompts, D width, L blocks, K classes.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vpt.recipe.loading import load_recipe
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


traffic, scaling = script("traffic"), script("scaling")
model: Any = sys.modules["scaling_model"]


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

    forks = launched(work, folder / "output.txt", "ddp" if strategy == "ddp" else str(file))
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
        size, _ = scaling.sent(scaling.work(load_recipe([], [*VIT_B, *VPT]), K).passes(strategy, 2))
        assert found["step_bytes"] == pytest.approx(size / 2, rel=1e-4)
        times = found["collectives_ms"]
        assert set(times) == set(model.TIMES)
        assert all(ms > 0 for sizes in times.values() for ms in sizes.values())


@pytest.mark.distributed
def test_zero3_gathers_what_it_shards_and_a_reader_only_once(tmp_path: Path) -> None:
    words = ["backbone.name=demo", "backbone.weights=random", "train.batch_size=2", "method.name=linear"]
    for found in measured("zero3", tmp_path, *words):
        size, _ = scaling.sent(scaling.work(load_recipe([], words), K).passes("zero3", 2))
        assert found["step_bytes"] == pytest.approx(size / 2, rel=0.01)
        assert found["wire_bytes"] is None or found["wire_bytes"] > found["step_bytes"]


def ring(ranks: list[np.ndarray], *, gather: bool) -> int:
    """A reduce-scatter in place, after which rank r holds the sum of part r + 1, or the all-gather that follows it;
    numbers that each of them has sent."""
    count, sent = len(ranks), 0
    parts = [np.split(one, count) for one in ranks]  # views
    for step in range(count - 1):
        moved = [parts[r][(r + gather - step) % count].copy() for r in range(count)]
        for r, numbers in enumerate(moved):
            there = parts[(r + 1) % count][(r + gather - step) % count]
            there[:] = numbers if gather else there + numbers
        sent += len(moved[0])
    return sent


def test_what_an_all_reduce_of_nodes_takes() -> None:
    """One is done on numbers, message by message: a ring in each node, rings of GPUs at the same place of all nodes."""
    nodes, near, size = 3, 4, 24
    gpus = np.random.default_rng(0).integers(0, 9, (nodes, near, size)).astype(float)
    wanted = gpus.sum((0, 1))
    inside = sum(ring(list(node), gather=False) for node in gpus) // nodes
    between = 0  # of a node: of all its GPUs
    for place in range(near):
        same = [np.split(gpus[node, place], near)[(place + 1) % near] for node in range(nodes)]
        between += ring(same, gather=False) + ring(same, gather=True)
    inside += sum(ring(list(node), gather=True) for node in gpus) // nodes
    assert (gpus == wanted).all()
    network = model.Network(near, 10.0, 3.0, 0.0, 0.0)
    assert 2 * network.moving(size, nodes * near) == pytest.approx(inside / 10 + between / 3)


def test_latencies_add_up_in_a_node_and_grow_with_the_logarithm_of_nodes() -> None:
    network = model.Network(8, 1.0, 1.0, 1.0, 100.0)
    assert [network.waiting(w) for w in (1, 2, 8, 16, 64, 1024)] == [0, 1, 7, 107, 307, 707]
    assert network.moving(5.0, 1) == 0


def test_where_scaling_stops() -> None:
    assert model.stops({1: 9.0, 2: 10.0, 4: 10.1, 8: 18.0, 16: 18.1}, weak=True) == {"90%": 2, "50%": 8}
    # Perfect to 2, half at 8; what comes after a fall does not count.
    assert model.stops({1: 16.0, 2: 8.0, 4: 5.0, 8: 4.0, 16: 1.0}, weak=False) == {"90%": 2, "50%": 16}


def test_what_collectives_take_is_on_a_line_through_few_and_many_bytes() -> None:
    plain = {"12": 2.0, "1000012": 102.0}
    assert scaling.taken(plain, 12, 1) == pytest.approx(2.0)
    assert scaling.taken(plain, 1_000_012, 1) == pytest.approx(102.0)
    assert scaling.taken(plain, 500_000, 3) == pytest.approx(3 * (2.0 - 12e-4) + 50.0)
    assert scaling.taken({"12": 2.0, "1000012": 1.0}, 10**9, 1) == pytest.approx(2.0)  # no rate was seen


def test_a_process_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert scaling.main(["backbone.name=demo", "--methods", "linear"]) == 3
    assert "error: linear, apart, process 0 of 1: exit code 1" in capsys.readouterr().err


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of traffic.py a script without torch, which prints what it gets; the real one is tested above."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text("""
import json, os, sys
variables = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "ACCELERATE_DEEPSPEED_CONFIG_FILE")}
file = variables.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE")
together = variables["WORLD_SIZE"] is not None
print("output of a library")
print(json.dumps({
    "variables": variables, "words": sys.argv[1:], "config": file and json.load(open(file)),
    "step_bytes": 51424 if together else 0, "start_bytes": 0, "wire_bytes": None, "gradient_bytes": 51400,
    "calls": {}, "step_ms": 9.0 + int(variables["RANK"] or 0) + 2 * together,
    "collectives_ms": dict.fromkeys(("all_reduce", "reduce", "all_gather"), {"8": 0.5, "16777216": 20.0})
    if variables["WORLD_SIZE"] == "2" else None,
}))
""")
    monkeypatch.setattr(scaling, "TRAFFIC", stand_in)
    return tmp_path / "out"


@pytest.mark.parametrize("strategy", ["apart", "ddp", "zero0", "zero2"])
def test_processes_get_the_variables_of_a_launcher(strategy: str, quick: Path) -> None:
    arguments = scaling._parser().parse_args(["backbone.name=demo", "--images", "3"])
    found = scaling.start("vqt", strategy, 2, arguments)
    together = strategy != "apart"
    assert [one["variables"]["RANK"] for one in found] == (["0", "1"] if together else [None, None])
    assert {one["variables"]["WORLD_SIZE"] for one in found} == {"2" if together else None}
    stages = [one["config"] and one["config"]["zero_optimization"]["stage"] for one in found]
    assert stages == [{"zero0": 0, "zero2": 2}.get(strategy)] * 2
    for one in found:  # the work of each stays the same
        assert {"method.name=vqt", "backbone.name=demo", f"train.batch_size={6 if together else 3}"} <= set(
            one["words"]
        )


def test_last_line_is_the_file_with_both_tables(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "BACKBONES", ("demo",))
    monkeypatch.setattr(model, "model_flops", lambda recipe, preprocessing, classes: 10**9)  # test_benchmark_step.py
    words = ["backbone.name=demo", "--methods", "linear", "--strategies", "ddp", "zero1", "--processes", "2"]
    words += ["--turns", "1", "--out", str(quick)]
    assert scaling.main(words) == 0
    out = capsys.readouterr().out
    (file,) = quick.iterdir()
    result = json.loads(file.read_text())
    assert (file.name, json.loads(out.splitlines()[-1])) == ("scaling-demo-b2-fp32-cpu.json", result)
    alone, engine, apart, ddp, zero1 = result["measured"]
    assert [(one["strategy"], one["processes"]) for one in result["measured"]] == [
        *(("apart", 1), ("zero1", 1), ("apart", 2), ("ddp", 2), ("zero1", 2))
    ]
    assert (alone["step_bytes"], apart["step_bytes"], ddp["step_bytes"]) == (0, 0, 51424)
    assert abs(ddp["bytes_error"]) < 0.01  # 128 + 1 numbers for each of 100 classes
    # The slower process counts; 9 ms of computing, three all-reduces, and hardly any bytes.
    assert ddp["step_ms"] == 12
    assert ddp["model_ms"] == pytest.approx(9 + 3 * 0.5, rel=0.02)
    assert (engine["step_ms"], "model_ms" in engine) == (11, False)
    # ZeRO's engine took 2 ms more of one process; four all-reduces, two reductions, one gather.
    assert zero1["model_ms"] == pytest.approx(9 + 2 + 7 * 0.5, rel=0.02)
    assert (zero1["compute_ms"], zero1["engine_ms"]) == (9, 2)
    assert ddp["ms_error"] == pytest.approx(ddp["model_ms"] / 12 - 1, abs=1e-4)
    for kind in ("weak", "strong"):
        rows = {(one["method"], one["strategy"]): one for one in result["paper"][kind]}
        assert len(rows) == 8
        assert list(rows["full", "ddp"]["step_ms"]) == [str(2**power) for power in range(11)]
        # The less is exchanged, the further it scales.
        assert rows["vpt_deep", "ddp"]["stops_at"]["90%"] >= rows["full", "zero3"]["stops_at"]["90%"]
        assert f"{kind} scaling, " in out

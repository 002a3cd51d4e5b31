"""benchmarks/sweep.py: what it prints, and that the published way which it measures against is VQT.

Q queries, K classes, T trials.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dist_vpt.methods.config_readers import VQTConfig
from dist_vpt.methods.vqt import VQT
from tests.evas import EVAS
from tests.methods.test_vqt import BACKBONES, loss_of, make, make_backbone

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WAYS = ("split", "cached", "cached_trials")
K, T, Q = 10, 3, 2
PRECISIONS = ("fp32", "bf16")
# Calls the script, which is to measure bf16 on any machine: what it keeps for backward does not depend on speed.
IN_BOTH = "import sys, sweep; sweep.choose_precision = lambda *, cpu: ('bf16', ''); sys.exit(sweep.main())"
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TINY = [
    "backbone.name=demo",
    f"method.queries={Q}",
    "train.batch_size=4",
    "runtime.device=cpu",
    "--classes", str(K),
    "--trials", str(T),
    "--images", "6",
    "--published-batch", "3",
    "--repeats", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[tuple[ModuleType, ModuleType]]:
    """sweep.py and published_vqt.py, imported as the first's own call imports its neighbors."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        found = []
        for name in ("sweep", "published_vqt"):
            spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
            assert spec
            assert spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
            found.append(module)
        yield found[0], found[1]
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The script in a process of its own, in both precisions: its JSON, and the folder it ran in."""
    here = tmp_path_factory.mktemp("benchmark")
    done = subprocess.run(
        [sys.executable, "-c", IN_BOTH, *TINY, "--out", "out"],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), here


@pytest.mark.slow
def test_last_line_is_the_whole_result(run: tuple[dict[str, Any], Path]) -> None:
    result, here = run
    assert set(result) == {
        "seconds_per_image_and_trial", "saved_for_backward_mib", "floor", "logits_difference", "method",
        "method_settings", "queries", "trials", "backbone", "image_size", "attention", "classes", "batch",
        "published_batch", "images", "cache", "optimizer", "repeats", "device", "device_type", "machine", "versions",
        *(f"ratio_{name}" for name in WAYS), *(f"ratio_{name}_same_precision" for name in WAYS),
    }  # fmt: skip
    assert (result["batch"], result["published_batch"], result["images"]) == (4, 3, 6)
    assert (result["trials"], result["classes"], result["queries"], result["repeats"]) == (T, K, Q, 2)
    assert (result["backbone"], result["optimizer"], result["cache"]) == ("demo", "adam", "memory")
    assert result["machine"]["threads"] == 1
    assert {"python", "torch", "timm"} <= set(result["versions"])
    files = [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()]
    assert files == [f"out/sweep-vqt-demo-q{Q}-b4-t{T}-cpu.json"]
    assert json.loads((here / files[0]).read_text()) == result


@pytest.mark.slow
def test_ratios_are_those_of_the_seconds(run: tuple[dict[str, Any], Path]) -> None:
    seconds = run[0]["seconds_per_image_and_trial"]
    assert set(seconds) == {"published", *WAYS}
    assert all(set(by_precision) == set(PRECISIONS) for by_precision in seconds.values())
    for name in WAYS:
        for precision in PRECISIONS:
            ratio = seconds["published"]["fp32"] / seconds[name][precision]
            same = seconds["published"][precision] / seconds[name][precision]
            assert run[0][f"ratio_{name}"][precision] == pytest.approx(ratio, rel=1e-3)
            assert run[0][f"ratio_{name}_same_precision"][precision] == pytest.approx(same, rel=1e-3)


@pytest.mark.slow
def test_the_floor_is_what_must_be_read_and_multiplied(run: tuple[dict[str, Any], Path]) -> None:
    floor, seconds = run[0]["floor"], run[0]["seconds_per_image_and_trial"]
    for name in ("cached", "cached_trials"):
        for precision in PRECISIONS:
            least = floor["seconds_per_image_and_trial"][name][precision]
            assert floor["time_over_floor"][name][precision] == pytest.approx(
                seconds[name][precision] / least, rel=1e-3
            )


@pytest.mark.slow
def test_a_frozen_stream_is_not_kept_for_backward(run: tuple[dict[str, Any], Path]) -> None:
    saved = run[0]["saved_for_backward_mib"]
    for precision in PRECISIONS:
        assert saved["published"][precision] > 3 * saved["split"][precision]
        assert saved["split"][precision] == saved["cached"][precision]  # it makes no difference where n comes from
        # Keys and values are twice n, but T trials share them; unshared, they would take more than T times one's bytes.
        assert T * saved["cached_trials"][precision] < 2.5 * saved["cached"][precision]
    assert 1.5 < saved["published"]["fp32"] / saved["published"]["bf16"] < 2.5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("which", sorted(set(BACKBONES) - set(EVAS)))  # which the published code does not know
def test_the_published_way_is_vqt(
    which: str, kernel: str, dropout: float, benchmarks: tuple[ModuleType, ModuleType]
) -> None:
    split, published = make_both(which, benchmarks[1], queries=3, dropout=dropout)
    for block in published.backbone.blocks:
        block.attn.fused_attn = kernel == "sdpa"  # type: ignore[union-attr]
    check_equal(split, published)


def test_the_published_way_leaves_blocks_out(benchmarks: tuple[ModuleType, ModuleType]) -> None:
    check_equal(*make_both("plain", benchmarks[1], queries=2, blocks=(0, 2), pooling="mean"))


def make_both(which: str, published_vqt: ModuleType, **settings: Any) -> tuple[VQT, VQT]:
    split = make(torch.float64, which, **settings)
    backbone = make_backbone(torch.float64, **BACKBONES[which])
    published = published_vqt.PublishedVQT(
        VQTConfig(head="published", init="random", **settings), backbone, 4, torch.float64
    ).double()
    published.load_state_dict(split.state_dict())
    return split.train(), published.train()


def check_equal(split: VQT, published: VQT) -> None:
    found = []
    for method in (split, published):
        torch.manual_seed(5)
        logits = method(IMAGES)
        loss_of(logits).backward()
        found.append({"logits": logits, **{name: p.grad for name, p in method.trainable()}})
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).abs().max() < 1e-10 * wanted.abs().max(), name


def test_ways_that_disagree_are_refused(
    benchmarks: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    sweep = benchmarks[0]
    seen_by_all = lambda tokens, queries: torch.zeros(tokens + queries, tokens + queries)  # noqa: E731
    monkeypatch.setattr(sys.modules["published_vqt"], "query_mask", seen_by_all)
    assert sweep.main([*TINY, "--out", str(tmp_path)]) == 3
    captured = capsys.readouterr()
    assert "logits in fp32 differ from the published way's by split" in captured.err
    assert "{" not in captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_bf16_is_measured_where_the_machine_computes_faster_in_it(
    name: str,
    benchmarks: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(benchmarks[0], "choose_precision", lambda *, cpu: (name, f"since {cpu}"))
    assert benchmarks[0].main([*TINY, "--repeats", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert ("bf16 is not measured, since True" in out) == (name == "fp32")
    result, measured = json.loads(out.splitlines()[-1]), {"fp32", name}
    for key in ("seconds_per_image_and_trial", "saved_for_backward_mib", "logits_difference"):
        assert all(set(by_precision) == measured for by_precision in result[key].values())
    assert set(result["floor"]["matmul_tflops"]) == measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.name=linear"], "method.name = linear: only vqt"),
        (["runtime.precision=bf16"], "both are measured"),
        (["train.grad_accum_steps=2"], "use --published-batch"),
        (["stream.cache=memory"], "leave it out"),
        (["--images", "3"], "--images 3: must be at least a batch, 4"),
    ],
)
def test_what_it_does_not_measure_is_refused(
    words: list[str],
    message: str,
    benchmarks: tuple[ModuleType, ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    tiny = [word for word in TINY if "queries" not in word]
    assert benchmarks[0].main([*tiny, *words, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""benchmarks/step.py: what it prints, and that its counts are right.

B batch, N tokens, P prompts, D width, L blocks, K classes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"
_spec = importlib.util.spec_from_file_location("benchmark_step", SCRIPT)
assert _spec
assert _spec.loader
step = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(step)

TINY = [
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "data.image_size=32",
    "train.batch_size=2",
    "runtime.device=cpu",
]
VPT = ["method.prompts=3", "runtime.precision=bf16"]
D, L, K, P = 192, 12, 10, 3  # ViT-Ti
PATCHES, PIXELS = 4, 3 * 16 * 16  # of a 32 px image
KEYS = {
    "step_ms", "images_per_s", "saved_for_backward_mib", "peak_mib", "model_flops", "matmul_tflops", "utilization",
    "method", "method_settings", "backbone", "image_size", "classes", "batch", "micro_batch", "precision",
    "checkpointing", "offload", "attention", "compile", "optimizer", "repeats", "parameters", "device", "device_type",
    "machine", "versions",
}  # fmt: skip


def tiny(*overrides: str) -> Recipe:
    return load_recipe([], [*TINY, *overrides])


@cache
def saved_mib(*overrides: str) -> float:
    recipe = tiny(*overrides)
    inputs = resolve_inputs(recipe)
    method = build_method(recipe, inputs, K)[0].train()
    batch = step.synthetic_batches(recipe, inputs, K)[0]
    return step.saved_for_backward(method, lambda: step.micro_batch_loss(method, recipe, batch)) / 2**20


COUNTED = {
    "fp32": [*VPT, "runtime.precision=fp32"],
    "block": [*VPT, "runtime.activation_checkpointing=block"],
    "projection": [*VPT, "method.projection=8"],
    "linear": ["method.name=linear"],
    "full": ["method.name=full", "runtime.precision=bf16"],
}


@pytest.fixture(scope="module")
def flops() -> dict[str, int]:
    """Counted in a process of its own: a backward pass on the meta device starts threads, after which torch refuses to
    be forked, and other tests fork."""
    code = f"""
import json, runpy, sys
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.training.inputs import resolve_inputs
count, found = runpy.run_path(sys.argv[1])["model_flops"], {{}}
for name, words in json.loads(sys.argv[2]).items():
    recipe = load_recipe([], words)
    found[name] = count(recipe, resolve_inputs(recipe), {K})
print(json.dumps(found))
"""
    recipes = {name: [*TINY, *words] for name, words in COUNTED.items()}
    words = [sys.executable, "-c", code, str(SCRIPT), json.dumps(recipes)]
    found: dict[str, int] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return found


def block_flops(tokens: int) -> tuple[int, int]:
    """Forward of one image: the products with weights (qkv 3, projection 1, MLP 4 + 4: 12 D^2), and attention's two."""
    return L * 2 * tokens * 12 * D**2, L * 2 * 2 * tokens**2 * D


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The script as a user calls it: its JSON, and the folder it ran in."""
    here = tmp_path_factory.mktemp("benchmark")
    words = [*TINY, *VPT, "--repeats", "2", "--classes", str(K), "--out", "out"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), here


def test_last_line_is_the_whole_result(run: tuple[dict, Path]) -> None:
    result, _ = run
    assert set(result) == KEYS
    assert result["method"] == "vpt"
    assert result["method_settings"]["prompts"] == P
    assert (result["batch"], result["precision"], result["checkpointing"]) == (2, "bf16", "none")
    assert result["parameters"]["trained"] == L * P * D + K * (D + 1)
    assert result["parameters"]["total"] > 5_000_000
    assert result["images_per_s"] == pytest.approx(2 / (result["step_ms"] / 1e3), rel=1e-3)
    assert result["utilization"] == pytest.approx(
        result["model_flops"] * result["images_per_s"] / (result["matmul_tflops"] * 1e12), rel=1e-3
    )
    assert result["peak_mib"] > 50
    assert {"python", "torch", "timm"} <= set(result["versions"])
    assert result["machine"]["threads"] == 1


def test_file_holds_the_same_and_is_all_that_is_written(run: tuple[dict, Path]) -> None:
    result, here = run
    files = [str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()]
    assert files == ["out/step-vpt-vit_tiny_patch16_224-b2-bf16-none-cpu.json"]
    assert json.loads((here / files[0]).read_text()) == result


def test_saved_for_backward_is_the_same_on_every_run(run: tuple[dict, Path]) -> None:
    assert round(saved_mib(*VPT), 3) == run[0]["saved_for_backward_mib"]


def test_saved_for_backward_follows_policy_and_method() -> None:
    vpt, block = saved_mib(*VPT), saved_mib(*VPT, "runtime.activation_checkpointing=block")
    linear = saved_mib("method.name=linear", "runtime.precision=bf16")
    assert linear < block < vpt / 5
    # Each block's input and the last one's output; beside them the head's few numbers.
    tokens = 2 * (1 + P + PATCHES) * D * 2
    assert (L + 1) * tokens <= block * 2**20 < (L + 2) * tokens
    assert linear * 2**20 < 2 * (D + 2 * K) * 4  # a reader keeps nothing of the backbone


def test_a_storage_counts_once_and_weights_never() -> None:
    layer = nn.Linear(4, 4)
    given = torch.ones(3, 4, requires_grad=True)

    def loss() -> torch.Tensor:
        out = layer(given)  # saves `given` and the weight
        return (out[:1] * out[1:2] * 2).sum()  # saves two views of `out`

    assert step.saved_for_backward(layer, loss) == 2 * given.nbytes


@pytest.mark.parametrize("name", ["fp32", "block"])
def test_flops_of_vpt(name: str, flops: dict[str, int], run: tuple[dict, Path]) -> None:
    weights, attention = block_flops(1 + P + PATCHES)
    patches = 2 * PATCHES * PIXELS * D
    # Frozen: the patches forward alone; products with weights once more (to their inputs); attention's two products
    # have two gradients each; the head has its forward and both gradients.
    by_hand = patches + 2 * weights + 3 * attention + 3 * 2 * D * K
    assert flops[name] == by_hand == run[0]["model_flops"]


def test_flops_of_a_projection_are_shared_by_the_batch(flops: dict[str, int], run: tuple[dict, Path]) -> None:
    extra = flops["projection"] - run[0]["model_flops"]
    assert extra == L * 3 * 2 * P * 8 * D // 2  # forward and both gradients of L sets, for two images


def test_flops_of_linear_and_full(flops: dict[str, int]) -> None:
    weights, attention = block_flops(1 + PATCHES)
    patches = 2 * PATCHES * PIXELS * D
    assert flops["linear"] == patches + weights + attention + 2 * 2 * D * K
    # Nothing asks for the gradient of the image, so the patches have two products and not three.
    full = 2 * patches + 3 * (weights + attention) + 3 * 2 * D * K
    assert flops["full"] == full


def test_mistakes_are_the_recipes_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = step.main([*TINY, "method.prompt=3", "runtime.activation_checkpointing=blok", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert code == 2
    assert "2 mistakes in the recipe" in error
    assert "prompts" in error
    assert "block" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repeats", ["0", "-1", "many"])
def test_repeats_must_be_a_count(repeats: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main([*TINY, f"--repeats={repeats}"])
    assert stopped.value.code == 2
    assert "at least 1" in capsys.readouterr().err

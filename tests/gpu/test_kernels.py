"""Part kernels of the acceptance on a GPU: attention, compiled blocks, memory policies, and what `plan` counts."""

from pathlib import Path

import pytest
import torch

from dist_vpt.errors import UserError
from dist_vpt.planning.choices import as_counted
from dist_vpt.planning.footprint import footprint
from dist_vpt.planning.measure import make_training, measured_bytes, synthetic_batches
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.engine import TrainState, train_step
from dist_vpt.training.inputs import resolve_inputs
from tests.gpu.device import BACKBONE, BATCH, DRY, KEY, accepts, cuda_only, train

pytestmark = accepts
CLASSES = 10
VPT = ("method.name=vpt", "method.prompts=10")
SWIN = (
    ("backbone.name=swin_tiny_patch4_window7_224", "data.image_size=224", "backbone.weights=random")
    if DRY
    else ("backbone.name=swin_base_patch4_window7_224", "data.image_size=224", "backbone.weights=random")
)


def recipe_of(*overrides: str) -> Recipe:
    keys = ("data.task=digits", f"train.batch_size={BATCH}", "optim.lr=1e-3", "runtime.precision=bf16", KEY)
    return load_recipe([], [*BACKBONE, *keys, *overrides])


def steps(*overrides: str, count: int = 2) -> tuple[list[float], TrainState]:
    """Losses of the first steps on the same noise."""
    recipe = recipe_of(*overrides)
    inputs = resolve_inputs(recipe)
    training, batches = make_training(recipe, inputs, CLASSES), synthetic_batches(recipe, inputs, CLASSES)
    losses = []
    for _ in range(count):
        losses.append(train_step(training, batches, norms=True).read().loss)
        training.progress.step += 1
    return losses, training


def assert_as_plain(*overrides: str, rel: float = 1e-2, more: tuple[str, ...] = VPT) -> TrainState:
    """The same losses as without these overrides; bf16 rounds in other places."""
    plain, _ = steps(*more)
    found, training = steps(*more, *overrides)
    assert found == pytest.approx(plain, rel=rel)
    return training


@pytest.mark.parametrize("kernel", ["sdpa", "eager"] if DRY else ["sdpa", "sdpa_flash", "sdpa_efficient", "eager"])
def test_kernels_give_the_same_losses(kernel: str) -> None:
    training = assert_as_plain(f"runtime.attention={kernel}")
    assert training.method.backbone.chosen["attention"].startswith(kernel)


@cuda_only
def test_flash_refuses_float32() -> None:
    with pytest.raises(UserError, match="sdpa_flash"):
        steps(*VPT, "runtime.precision=fp32", "runtime.attention=sdpa_flash")


@pytest.mark.parametrize(
    "more",
    [VPT, ("method.name=vpt", "method.layers=3", "method.expand=false"), ("method.name=lora",), (*VPT, *SWIN)],
    ids=["vpt", "layers", "lora", "swin"],
)
def test_every_block_is_compiled(more: tuple[str, ...]) -> None:
    if DRY and any("swin" in key for key in more):
        pytest.skip("a Swin takes the CPU's compiler minutes")
    training = assert_as_plain("runtime.compile=true", more=more)
    assert training.method.backbone.chosen["compile"] == "each block"


def test_a_compiled_run_says_so(tmp_path: Path) -> None:
    """With a last batch that is smaller, checkpointing, and scoring."""
    keys = (*VPT, "train.batch_size=300", "runtime.compile=true", "runtime.activation_checkpointing=block")
    compiled, plain = train(tmp_path / "compiled", *keys), train(tmp_path / "plain", *keys, "runtime.compile=false")
    assert compiled["runtime"]["compile"] == "each block"
    assert compiled["last"]["train"]["loss"] == pytest.approx(plain["last"]["train"]["loss"], rel=1e-3)
    assert "could not be compiled" not in (tmp_path / "compiled" / "train.log").read_text()


@pytest.mark.parametrize("policy", ["mlp", "block", "every-2", "budget-0.5"])
def test_checkpointing_changes_no_loss(policy: str) -> None:
    assert_as_plain(f"runtime.activation_checkpointing={policy}", rel=1e-3)


@cuda_only
def test_offload_changes_no_loss() -> None:
    assert_as_plain("runtime.offload=true", rel=1e-3)


def test_eight_bits() -> None:
    pytest.importorskip("torchao")
    training = assert_as_plain("runtime.quantize=int8", rel=5e-2)
    assert training.method.backbone.chosen["frozen weights"] == "int8"


@pytest.mark.parametrize(
    "overrides",
    [VPT, (*VPT, "runtime.activation_checkpointing=block"), ("method.name=full",), ("method.name=linear",)],
    ids=["vpt", "block", "full", "linear"],
)
def test_the_plan_is_near_the_measured_peak(overrides: tuple[str, ...]) -> None:
    """Within a tenth, and low by no more than 5 %; the CPU's kernels take memory for themselves in bf16."""
    dry = ("train.batch_size=256", "runtime.precision=fp32")  # activations outweigh what norms copy
    recipe = recipe_of(*(dry if DRY else ()), *overrides)
    counted = footprint(as_counted(recipe, gpus=not DRY), CLASSES, gpus=not DRY).on("ddp", 1)
    estimate, found = counted.held + counted.working, measured_bytes(recipe, CLASSES)
    assert 0.95 * found <= estimate <= 1.1 * found


def test_memory_goes_back_after_a_run(tmp_path: Path) -> None:
    if DRY:
        pytest.skip("the CPU's allocator is not asked")
    train(tmp_path / "first", *VPT)
    before = torch.cuda.memory_allocated()
    train(tmp_path / "second", *VPT)
    assert torch.cuda.memory_allocated() <= before + 2**20

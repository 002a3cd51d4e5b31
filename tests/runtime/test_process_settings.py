"""Settings of a whole process that a run makes: TF32, and deterministic kernels."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_vpt.experiments import run as run_module
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime.apply import apply_runtime
from dist_vpt.runtime.tf32 import apply_tf32
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs
from tests.running import TINY, train


def switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    products, convolutions = switches()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


@pytest.mark.parametrize(
    ("keys", "used"),
    [
        ([], True),
        (["runtime.deterministic=true"], False),
        (["runtime.deterministic=true", "runtime.tf32=true"], True),
        (["runtime.tf32=false"], False),
    ],
)
def test_products_and_convolutions_are_set_alike(keys: list[str], used: bool) -> None:
    backbone = SimpleNamespace(chosen={})
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not used, not used
    apply_tf32(backbone, load_recipe([], keys).runtime)  # type: ignore[arg-type]
    assert switches() == (used, used)
    assert backbone.chosen == {"tf32": "on" if used else "off"}
    assert torch.get_float32_matmul_precision() == ("high" if used else "highest")  # torch's compiler asks this


def test_deterministic_kernels_end_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []
    fit = run_module.fit
    monkeypatch.setattr(
        run_module, "fit", lambda t: during.append(torch.are_deterministic_algorithms_enabled()) or fit(t)
    )
    train(tmp_path / "a", "runtime.deterministic=true", "train.test=false")
    assert not torch.are_deterministic_algorithms_enabled()
    train(tmp_path / "b", "train.test=false")
    assert during == [True, False]


def test_a_gpu_s_runs_have_it_and_a_cpu_s_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe([], [*TINY, "runtime.tf32=true"])
    method, _ = build_method(recipe, resolve_inputs(recipe), 10)
    assert "tf32" not in method.backbone.chosen
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    apply_runtime(method.backbone, recipe.runtime, torch.float32, writes=True)
    assert method.backbone.chosen["tf32"] == "on"

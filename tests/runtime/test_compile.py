"""Compiled blocks: a graph for every shape and kind of block, and a report where that fails.

Dynamo is torch's; its graphs are run as they are (backend "eager"), since what is tested are its limits.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from dist_vpt.methods.base import Method
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.runtime.activation_checkpointing import apply_checkpointing
from dist_vpt.runtime.apply import apply_runtime
from dist_vpt.runtime.compile import WORTH_COMPILING, apply_compile, is_worth_compiling
from tests.backbones.test_swin import make as make_on_swin
from tests.methods.conftest import make_backbone
from tests.runtime.test_policies import make, numbers

LAYERS = {"name": "vpt", "layers": 2, "expand": False, "prompts": 2}


@pytest.fixture(autouse=True)
def graphs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with config.patch({name: getattr(config, name) for name in names}):  # what they were is restored
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def shapes_many() -> Method:
    """Tokens of two shapes for each batch: with prompts, and without in the last two of four blocks."""
    return make(settings=LAYERS)


def swin() -> Method:
    """More kinds of blocks and shapes than dynamo's own limit, with gradients and without."""
    return make_on_swin({"name": "vpt", "prompts": 2}).train()


def eva() -> Method:
    """Rotary positions that are passed beside the tokens; as many of their rows as there are prompts turn nothing."""
    return make(settings=LAYERS, kind="dinov3_swiglu")


@pytest.mark.parametrize("made", [shapes_many, swin, eva])
def test_every_shape_and_kind_is_compiled(made, recwarn: pytest.WarningsRecorder) -> None:
    images = [torch.randint(0, 256, (n, 3, 32 if made is swin else 16, 32 if made is swin else 16)) for n in (2, 3, 4)]

    def outputs(method: Method) -> list[torch.Tensor]:
        trained = [method(image) for image in images]
        with torch.no_grad():
            return [*trained, *(method.eval()(image) for image in images)]

    wanted, method = outputs(made()), made()
    apply_compile(method.backbone, cpu=True)
    for a, b in zip(outputs(method), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert method.backbone.chosen["compile"] == "each block"
    assert method.backbone.compiled
    assert graphs() > 8 + 1  # dynamo's limit and the probe
    assert not [w for w in recwarn if "compiled" in str(w.message)]


@pytest.mark.parametrize("policy", ["none", "block"])
def test_a_block_that_is_not_compiled_is_reported(policy: str) -> None:
    """The first shape has a graph; the other runs uncompiled, also where checkpointing computes them again."""
    wanted, method, reported = numbers(shapes_many()), shapes_many(), list[str]()
    apply_compile(method.backbone, cpu=True)
    method.backbone.reporters.append(reported.append)
    torch._dynamo.config.recompile_limit = 1
    apply_checkpointing(method.backbone, policy)
    for a, b in zip(numbers(method), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert reported == ["warning: block 2 of 4 could not be compiled and run uncompiled (more than 1 graphs)"]
    assert method.backbone.chosen["compile"] == reported[0].replace("block 2", "blocks 2, 3")


def test_the_compilers_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise AssertionError("no kernel for this")

    method = make()
    monkeypatch.setattr("dist_vpt.runtime.compile._try_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile.func, backend=broken))
    apply_compile(method.backbone, cpu=True)
    with pytest.warns(UserWarning, match="block 0 of 4 could not be compiled and run uncompiled"):
        result = numbers(method)
    for a, b in zip(result, numbers(make()), strict=True):
        assert torch.equal(a, b)
    assert "no kernel for this" in method.backbone.chosen["compile"]


def test_errors_of_a_block_pass() -> None:
    method = make()

    def full(block: torch.nn.Module, tokens_BND: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    method.backbone.run_block = torch.compiler.disable(full)
    apply_compile(method.backbone, cpu=True)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        numbers(method)


def test_where_null_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, where a method writes and trains long, without a budget."""
    backbone = make_backbone()
    weights = sum(p.numel() for p in backbone.blocks.parameters())
    long = int(WORTH_COMPILING / (4 * weights * backbone.tokens)) + 1
    assert is_worth_compiling(backbone, long)
    assert not is_worth_compiling(backbone, long - 2)

    def compiles(images: int = long, *overrides: str, writes: bool = True) -> bool:
        made: list[object] = []
        monkeypatch.setattr("dist_vpt.runtime.apply.apply_compile", lambda backbone, cpu: made.append(backbone))
        runtime = load_recipe([], ["data.task=digits", *overrides]).runtime
        apply_runtime(make_backbone(), runtime, torch.float32, writes=writes, images=images)
        return bool(made)

    assert not compiles()  # here, on the CPU
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiles()
    assert not compiles(long - 2)
    assert not compiles(writes=False)
    assert not compiles(long, "runtime.compile=false")
    assert not compiles(long, "runtime.activation_checkpointing=budget-0.5")
    assert not compiles(long, "runtime.device=cpu")
    assert compiles(1, "runtime.compile=true")

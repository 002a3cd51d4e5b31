"""Products by oneDNN: values and gradients against float64, what is kept for backward, and where torch's own stay."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_vpt.backbones import products
from dist_vpt.backbones.products import Linear, apply_linear, take_over_linears

LETTERS = {"x": "XI", "weight": "OI", "bias": "O"}
TOLERANCE = 1e-6  # of float32, relative to the largest number; sums of 96 products
INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(5, 96),
    "one row": lambda: torch.randn(1, 96),
    "a vector": lambda: torch.randn(96),
    "tokens": lambda: torch.randn(2, 7, 96),
    "four dimensions": lambda: torch.randn(2, 3, 4, 96),
    "every other token": lambda: torch.randn(2, 7, 96)[:, ::2],
    "transposed": lambda: torch.randn(96, 5).T,
    "the same for all": lambda: torch.randn(1, 96).expand(6, -1),
}


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor) -> list[np.ndarray]:
    """The output and the gradients of input, weight and bias, summed up one by one in float64."""
    x_MI, w_OI, dy_MO = (t.detach().double().numpy().reshape(-1, t.shape[-1]) for t in (x, weight, dy))
    b_O = np.zeros(len(w_OI)) if bias is None else bias.detach().double().numpy()
    y_MO = np.array([[sum(row * of_o) + b for of_o, b in zip(w_OI, b_O, strict=True)] for row in x_MI])
    dx_MI = sum(dy_MO[:, [o]] * w_OI[o] for o in range(len(w_OI)))
    dw_OI = sum(np.outer(dy_MO[m], x_MI[m]) for m in range(len(x_MI)))
    return [y_MO, np.asarray(dx_MI), np.asarray(dw_OI), dy_MO.sum(0)]


def assert_near(found: Tensor | None, wanted: np.ndarray) -> None:
    assert found is not None
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy().reshape(wanted.shape) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The products by oneDNN that are computed inside."""
    calls: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket is products.ONEDNN_LINEAR:
                calls.append("_linear_pointwise")
            return func(*args, **(kwargs or {}))

    with Calls():
        yield calls


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS)
def test_values_and_gradients(shape: str, with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, dy = INPUTS[shape]().requires_grad_(), torch.randn(48, 96, requires_grad=True), torch.randn(48)
    bias = torch.randn(48, requires_grad=True) if with_bias else None
    with counted() as calls:
        y = apply_linear(x, weight, bias)
        (y * dy).sum().backward()
    assert calls == ["_linear_pointwise"] * 2  # the output and the input's gradient
    assert y.shape == (*x.shape[:-1], 48)
    found = [y.detach(), x.grad, weight.grad, *([] if bias is None else [bias.grad])]
    for tensor, numbers in zip(found, expected(x, weight, bias, dy.expand_as(y)), strict=False):  # no bias
        assert_near(tensor, numbers)


@pytest.mark.usefixtures("onednn")
def test_gradients_that_repeat_a_number() -> None:
    """A sum's gradient has one number for all, and no strides."""
    x, weight = torch.randn(4, 96, requires_grad=True), torch.randn(48, 96)
    apply_linear(x, weight).sum().backward()
    assert_near(x.grad, expected(x, weight, None, torch.ones(4, 48))[1])


@pytest.mark.usefixtures("onednn")
def test_gradients_of_gradients() -> None:
    """As of a penalty on the size of a gradient, against torch's own in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        x, weight = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((4, 96), (48, 96)))
        (of_x,) = torch.autograd.grad(apply_linear(x, weight).square().sum(), x, create_graph=True)
        of_x.square().sum().backward()
        found.append([x.grad, weight.grad])
    for ours, wanted in zip(*found, strict=True):
        assert wanted is not None
        assert_near(ours, wanted.numpy())


class Own(Tensor):
    """A class of tensors with products of its own, as quantized ones have."""


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    ("trained", "kept", "calls"),
    [("", [], 1), ("x", ["weight"], 2), ("weight", ["x"], 1), ("bias", [], 1), ("x weight bias", ["x", "weight"], 2)],
)
def test_what_is_kept_and_computed(trained: str, kept: list[str], calls: int) -> None:
    """As by torch's own: an input only for a weight's gradient."""
    tensors = {"x": torch.randn(4, 96), "weight": torch.randn(48, 96), "bias": torch.randn(48)}
    for name in trained.split():
        tensors[name].requires_grad_()
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counted() as called:
        y = apply_linear(**{f"{name}_{letters}": tensors[name] for name, letters in LETTERS.items()})
        if trained:
            y.sum().backward()
    assert [name for name in tensors if any(t.data_ptr() == tensors[name].data_ptr() for t in found)] == kept
    assert len(called) == calls
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == trained.split()


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(
    ("dtype", "device", "context"),
    [
        (torch.float64, "cpu", nullcontext()),
        (torch.bfloat16, "cpu", nullcontext()),
        (torch.float32, "meta", nullcontext()),
        (torch.float32, "cpu", torch.autocast("cpu", torch.bfloat16)),
        (torch.float32, "cpu", torch.backends.mkldnn.flags(enabled=False)),
    ],
)
def test_where_torch_s_own_products_stay(dtype: torch.dtype, device: str, context: AbstractContextManager) -> None:
    x, layer = torch.randn(5, 96, dtype=dtype, device=device), nn.Linear(96, 48, dtype=dtype, device=device)
    with counted() as calls, context:
        y, wanted = apply_linear(x, layer.weight, layer.bias), layer(x)
    assert not calls
    assert y.dtype == wanted.dtype
    assert device == "meta" or torch.equal(y, wanted)


def test_small_weights_and_a_switch_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(32, 64)
    for on, least, called in [(False, 0, 0), (True, 64 * 32 + 1, 0), (True, 64 * 32, 1)]:
        monkeypatch.setattr(products, "_switch", {"onednn": on})
        monkeypatch.setattr(products, "LEAST", least)
        for rows in (1, 1000):
            with counted() as calls:
                apply_linear(torch.randn(rows, 64), weight)
            assert len(calls) == called


@pytest.mark.usefixtures("onednn")
def test_other_classes_and_layouts_of_tensors() -> None:
    x, weight = torch.randn(3, 96), torch.randn(48, 96)
    for own_x, own_weight in ((x.as_subclass(Own), weight), (x, weight.as_subclass(Own)), (x.to_sparse(), weight)):
        with counted() as calls:
            y = apply_linear(own_x, own_weight)
        assert not calls
        assert torch.allclose(y.as_subclass(Tensor), x @ weight.T, atol=1e-5)


@pytest.mark.usefixtures("onednn")
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """But for a row alone, with which torch's own products, too, are another kernel's."""
    x, weight, bias = torch.randn(600, 192), torch.randn(768, 192), torch.randn(768)
    wanted = apply_linear(x, weight, bias)
    for rows in (2, 7, 64, 65, 300, 599):
        assert torch.equal(apply_linear(x[:rows], weight, bias), wanted[:rows])


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_has_torch_s_own_products_and_any_batch(strict: bool) -> None:
    model = nn.Sequential(nn.Linear(96, 48))
    take_over_linears(model)
    rows = torch.export.Dim("rows", max=5000)
    program = torch.export.export(model, (torch.randn(3, 96),), dynamic_shapes=({0: rows},), strict=strict)
    assert "mkldnn" not in str(program.graph)
    assert program.module()(torch.randn(7, 96)).shape == (7, 48)


@pytest.mark.usefixtures("onednn")
@pytest.mark.filterwarnings("ignore")  # torch.jit is to go
def test_traces_and_functional_transforms_have_torch_s_own_products() -> None:
    layer, x = Linear(96, 48), torch.randn(3, 96)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    with counted() as calls:
        assert torch.allclose(torch.jit.trace(layer, x, check_trace=False)(x), wanted)
        assert torch.allclose(torch.func.vmap(layer)(x), wanted, rtol=0, atol=1e-5)
        of_x = torch.func.grad(lambda x: layer(x).sum())(x)
    assert torch.allclose(of_x, layer.weight.sum(0).expand_as(x), rtol=0, atol=1e-5)
    assert not calls


@pytest.mark.usefixtures("onednn")
def test_layers_of_a_model_are_taken_over_with_all_that_they_have() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(96, 48), nn.Sequential(Own(48, 48), nn.Linear(48, 8, bias=False)))
    addresses, seen = [tensor.data_ptr() for tensor in model.parameters()], []
    model[0].register_forward_hook(lambda *_: seen.append("hook"))
    x = torch.randn(3, 96)
    wanted = model(x)
    take_over_linears(model)
    assert [type(module) for module in model.modules() if isinstance(module, nn.Linear)] == [Linear, Own, Linear]
    assert [tensor.data_ptr() for tensor in model.parameters()] == addresses
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.1.weight"]
    with counted() as calls:
        found = copy.deepcopy(model)(x)
    assert calls == ["_linear_pointwise"] * 2
    assert seen == ["hook"] * 2
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)

"""Matrices of a model that stay in their file until each is needed.

A model that is sharded need never exist whole: it is built with its matrices on torch's meta device, and those of its
blocks refer to tensors of the file. A safetensors file is mapped into memory, where what nobody has read takes none of
it; files of pickles and .npz files are read whole, and stay in host memory until the last matrix has been read.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

BLOCKS = ("blocks.", "layers.")  # what the names of all tensors in blocks begin with: a ViT's, and a Swin's


@contextmanager
def without_matrices() -> Iterator[None]:
    """Have modules that are made within hold parameters of two and more dimensions on the meta device.

    Vectors and buffers are made as always.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.ndim > 1:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_complete(model: nn.Module, found: Mapping[str, Tensor]) -> bool:
    """Whether a file has every tensor of a model that is on the meta device."""
    return all(name in found for name, parameter in model.named_parameters() if parameter.is_meta)


def refer_to(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Have the matrices of a model's blocks refer to a file's tensors, and give those outside of them their values."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            full = f"{prefix}.{name}" if prefix else name
            if full.startswith(BLOCKS):
                parameter.in_file = found[full]  # type: ignore[attr-defined]
            else:
                module._parameters[name] = _with_values(parameter, found[full])


def read_deferred(module: nn.Module) -> Iterator[nn.Parameter]:
    """Give the parameters of a module that are still in their file their values, on the CPU, one after the other."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and parameter.is_meta:
                inner._parameters[name] = _with_values(parameter, parameter.in_file)  # type: ignore[attr-defined]
                yield inner._parameters[name]  # type: ignore[misc]


def _with_values(parameter: nn.Parameter, found: Tensor) -> nn.Parameter:
    """A copy, whatever the type: a collective that writes into a mapped file would keep a copy of each of its pages."""
    # By way of float32, in which models are loaded: a file in float64 is rounded twice there too.
    values = found.detach().to(torch.float32).to(parameter.dtype)
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), parameter.requires_grad)

"""Recording a method with torch.export, and the .pt2 file of what was recorded.

D inputs and O outputs of a linear layer.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from dist_vpt.backbones.products import Linear
from dist_vpt.backbones.vit import Backbone
from dist_vpt.inference.export_check import Arrays, Check
from dist_vpt.inference.export_preprocessing import ExportedModel
from dist_vpt.runtime.int8 import quantize_rows

METADATA = "metadata.json"  # name of the extra file


@dataclass(frozen=True)
class Recorded:
    """The computation of a model."""

    program: ExportedProgram
    names: list[str]  # of its inputs
    shapes: Any  # the dimensions that may be any number, as torch.export wants them; None: none


def record(model: ExportedModel, example: Sequence[Tensor], names: list[str], *, dynamic_batch: bool) -> Recorded:
    """Record what a model computes for inputs such as ``example``, without gradients and places in the source.

    A batch has any number of images with ``dynamic_batch``, and pictures that the model resizes have any size.
    """
    of_each: dict[int, Any] = {0: Dim("batch")} if dynamic_batch else {}
    if len(model.resizes):
        of_each |= {2: Dim("height"), 3: Dim("width")}
    shapes = (tuple(dict(of_each) for _ in names),) if of_each else None
    program = torch.export.export(model, tuple(example), dynamic_shapes=shapes, strict=False)
    for name, tensor in program.state_dict.items():  # nobody trains what was recorded; the method keeps its own
        if isinstance(tensor, nn.Parameter):
            program.state_dict[name] = nn.Parameter(tensor.detach(), requires_grad=False)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return Recorded(program, names, shapes)


def write(file: Path, recorded: Recorded, facts: dict[str, Any], check: Check, *, quantize: bool) -> str:
    """Write a .pt2 file and run it; returns a text about it."""
    torch.export.save(recorded.program, file, extra_files={METADATA: json.dumps(facts)})
    again = torch.export.load(file).module()

    def run(arrays: Arrays) -> np.ndarray:
        return again(*map(torch.from_numpy, arrays)).numpy()

    found = check.report_quantized(run) if quantize else check.compare(run)
    return f"a torch.export program, {file.stat().st_size / 2**20:,.1f} MiB; {found}"


def hold_in_int8(backbone: Backbone) -> None:
    """Hold the weights of the blocks' linear layers as int8 levels with a scale a row, multiplied where they are read.

    Everything else stays float32, and so does what is computed.
    """
    for linear in list(backbone.modules()):
        if isinstance(linear, Linear) and _in_block(linear, backbone):
            linear.requires_grad_(False)  # levels have no gradient
            parametrize.register_parametrization(linear, "weight", _Levels())


def _in_block(linear: nn.Module, backbone: Backbone) -> bool:
    return any(linear is module for block in backbone.blocks for module in block.modules())


class _Levels(nn.Module):
    """int8 levels [O, D] and scales [O, 1] -> the weight [O, D]."""

    def forward(self, levels_OD: Tensor, scale_O1: Tensor) -> Tensor:
        return levels_OD * scale_O1

    def right_inverse(self, weight_OD: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(weight_OD)

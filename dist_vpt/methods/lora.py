"""Low-rank adaptation (Hu et al., ICLR 2022, arXiv 2106.09685). A writer.

N tokens, D inputs and O outputs of a linear layer, r rank, R ranks of all targets of a layer together.

A targeted linear layer gives W x + (alpha / r) B A x, with A [r, D] and B [O, r] trained. Queries, keys and values are
rows of one layer in most of timm, and each has its own A and B; so have the two layers at the start of a SwiGLU.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from dist_vpt.backbones.blocks import Target, targets_of
from dist_vpt.backbones.vit import Backbone
from dist_vpt.methods.config import LoRAConfig
from dist_vpt.methods.hooks import HookedMethod, replace_output


class LoRA(HookedMethod):
    """``lora.BLOCK.TARGET.down`` is A, ``up`` is B. B starts at zero, A does not, so that both get gradients."""

    def __init__(self, recipe: LoRAConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.recipe = recipe
        self.lora = nn.ModuleList()
        for number, block in enumerate(backbone.blocks):
            updates = nn.ModuleDict()
            of_layers: dict[nn.Linear, list[_LowRank]] = {}
            for key, _, linear, rows in self._targets(block, number):
                update = _LowRank(recipe, linear.in_features, len(range(linear.out_features)[rows]), rows)
                of_layers.setdefault(linear, []).append(update)
                updates[key] = update
            for linear, of_layer in of_layers.items():
                replace_output(linear, _Updates(of_layer))
            self.lora.append(updates)

    def _targets(self, block: nn.Module, number: int) -> Iterator[Target]:
        for target in self.recipe.targets:
            yield from targets_of(block, number, target)

    def updates_of_layers(self) -> Iterator[tuple[Target, list["_LowRank"]]]:
        """The linear layers that are changed, all their rows, each with the updates of its targets."""
        for number, (block, updates) in enumerate(zip(self.backbone.blocks, self.lora, strict=True)):
            found: dict[str, tuple[Target, list[_LowRank]]] = {}
            for target in self._targets(block, number):
                whole = target._replace(rows=slice(None))
                found.setdefault(target.name, (whole, []))[1].append(updates[target.key])  # type: ignore[index]
            yield from found.values()

    def merged(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, (block, updates) in enumerate(zip(self.backbone.blocks, self.lora, strict=True)):
            for key, name, linear, rows in self._targets(block, number):
                update: Any = updates[key]  # type: ignore[index]
                weight_OD = tensors.setdefault(f"{name}.weight", linear.weight.detach().clone())
                weight_OD[rows] += update.scale * update.up.weight.detach() @ update.down.weight.detach()
        return tensors


class _Factor(nn.Linear):
    """One of the two matrices. Called, it gives a copy in a dtype, which stays when ZeRO-3 frees the parameter."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        return self.weight.to(dtype, copy=True)


class _LowRank(nn.Module):
    """The two matrices of a target; ``rows`` are its rows of the layer's weight."""

    def __init__(self, recipe: LoRAConfig, inputs: int, outputs: int, rows: slice):
        super().__init__()
        self.scale, self.dropout, self.rows = recipe.alpha / recipe.rank, recipe.dropout, rows
        self.down, self.up = _Factor(inputs, recipe.rank), _Factor(recipe.rank, outputs)
        nn.init.kaiming_normal_(self.down.weight, nonlinearity="linear")
        nn.init.zeros_(self.up.weight)


class _Updates:
    """Adds the updates of all targets of a linear layer to its output."""

    def __init__(self, updates: Sequence[_LowRank]):
        self.updates = updates

    def __call__(self, x_BND: Tensor, output_BNO: Tensor) -> Tensor:
        updates, first = self.updates, self.updates[0]
        downs = [update.down(x_BND.dtype) for update in updates]
        if first.dropout and first.training:  # each target drops others of the inputs
            inner = [F.linear(F.dropout(x_BND, first.dropout), down_rD) for down_rD in downs]
        else:
            inner = [F.linear(x_BND, downs[0] if len(downs) == 1 else torch.cat(downs))]
        inner_BNR = inner[0] if len(inner) == 1 else torch.cat(inner, dim=-1)
        ups = [update.up(output_BNO.dtype) for update in updates]
        rows = [update.rows for update in updates]
        return _AddProducts.apply(output_BNO, inner_BNR.to(output_BNO.dtype), first.scale, rows, *ups)


class _AddProducts(torch.autograd.Function):
    """y [..., O] + scale * h_t B_t^T in the rows of each target t, with h [..., R] and B_t [O_t, r].

    The products are added in their rows: as operations of autograd each would be padded to a tensor of y's size.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, scale: float, rows: list[slice], *ups: Tensor) -> Tensor:
        ctx.scale, ctx.rows = scale, rows
        ctx.save_for_backward(h, *ups)
        # In place where nobody else has the output: a layer does not keep it for backward, but a checkpointing policy
        # may, which is a dispatch mode, and a compiler plans with it.
        shared = torch.compiler.is_compiling() or _len_torch_dispatch_stack() or not y.is_contiguous()
        out = y.clone(memory_format=torch.contiguous_format) if shared else y.data
        out_XO = out.flatten(0, -2)
        for h_Xr, up_Or, of_target in zip(h.flatten(0, -2).chunk(len(ups), dim=1), ups, rows, strict=True):
            out_XO[:, of_target].addmm_(h_Xr, up_Or.T, alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        h, *ups = ctx.saved_tensors
        dy_XO, dh = gradients[0].flatten(0, -2), torch.empty_like(h)
        found = []
        pieces = (t.flatten(0, -2).chunk(len(ups), dim=1) for t in (h, dh))
        for h_Xr, dh_Xr, up_Or, of_target in zip(*pieces, ups, ctx.rows, strict=True):
            torch.mm(dy_XO[:, of_target], up_Or, out=dh_Xr)
            found.append((dy_XO[:, of_target].T @ h_Xr).mul_(ctx.scale))
        return gradients[0], dh.mul_(ctx.scale), None, None, *found

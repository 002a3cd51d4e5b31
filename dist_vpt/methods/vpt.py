"""Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119). A writer.

B batch, N tokens, P prompts, D width, d width of a prompt before its projection, X numbers of a prompt (here d), L
blocks, S image side.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.methods.base import Method
from dist_vpt.methods.bias import Biases
from dist_vpt.methods.cls import ClassToken
from dist_vpt.methods.config import VPTConfig
from dist_vpt.methods.token_scale import RAW_STD, block_inputs, init_scaled, token_scales


class VPT(Method):
    """Prompts p [sets, P, d]: set i is written before prompted block i (shallow: one set; shared: two).

    On Swin, where D grows from stage to stage, each stage has a tensor with its sets. Prompts that are pixels are in
    vpt_pixels.py.
    """

    on_swin = True
    prompts: nn.Parameter  # if one tensor holds them all
    token_scale: Tensor | None  # [sets], which multiplies prompts

    def __init__(self, recipe: VPTConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        if isinstance(backbone, SwinBackbone):
            _check_for_swin(recipe)
        extra: dict[str, nn.Module] = {}  # made first: they start at the weights in float32
        if "bias" in recipe.extra_trainable:
            extra["biases"] = Biases(backbone)
        if "cls" in recipe.extra_trainable:
            extra["class_token"] = ClassToken(backbone)
        super().__init__(backbone, classes, compute, head=recipe.head)
        for name, module in extra.items():
            self.add_module(name, module)
        self.recipe = recipe
        if recipe.init == "class_token" and getattr(backbone.stem, "cls_token", None) is None:
            raise UserError("method.init = class_token: the backbone has none; set method.init=tokens")
        self.set_of_block = self._schedule(len(backbone.blocks))
        self.first_blocks = [
            min(block for block, of in self.set_of_block.items() if of == each)
            for each in sorted(set(self.set_of_block.values()))
        ]
        last = max(self.set_of_block, default=0)
        if recipe.pooling in ("prompt_pool", "imgprompt_pool") and backbone.widths[last] != backbone.width:
            raise UserError(
                f"method.pooling = {recipe.pooling}: the last prompts are written before block {last}, and patches are "
                "merged after it, which drops prompts; set method.pooling=original"
            )
        stages = [(width, len(list(sets))) for width, sets in groupby(backbone.widths[n] for n in self.first_blocks)]
        stages = stages or [(backbone.width, 1)]
        self.names = ["prompts"] if len(stages) == 1 else [f"prompts_{stage}" for stage in range(len(stages))]
        for name, (width, sets) in zip(self.names, stages, strict=True):
            prompts = torch.empty(sets, *self._shape(width))
            if recipe.scaled:  # what is added to tokens starts small beside them
                init_scaled(prompts, RAW_STD / 10 if recipe.location.startswith("add") else RAW_STD)
            else:
                prompts.uniform_(*self._init_range(width))
            self.register_parameter(name, nn.Parameter(prompts))
        self.register_buffer("token_scale", torch.ones(len(self.first_blocks)) if recipe.scaled else None)
        self.projection = self._projection()

    def _schedule(self, blocks: int) -> dict[int, int]:
        """Block number -> number of the prompt set that is written before it."""
        recipe = self.recipe
        if not recipe.deep:
            return {0: 0}
        layers = blocks if recipe.layers is None else recipe.layers
        if layers > blocks:
            raise UserError(f"method.layers = {layers}: the backbone has {blocks} blocks; use at most that many")
        first = 0 if recipe.prompted_blocks == "first" else blocks - layers
        return {first + i: min(i, 1) if recipe.shared else i for i in range(layers)}

    def _shape(self, width: int) -> tuple[int, int]:
        """Shape of one set: the number of prompts, and the width of each."""
        prompts = {"add": self.backbone.tokens, "add-1": 1}.get(self.recipe.location, self.recipe.prompts)
        return prompts, self.recipe.projection or width

    def _init_range(self, width: int) -> tuple[float, float]:
        """Least and most of the uniform initial values: Xavier's for a patch's pixels."""
        bound = math.sqrt(6.0 / (3 * math.prod(self.backbone.patch_size) + (self.recipe.projection or width)))
        return -bound, bound

    def _projection(self) -> nn.Module:
        """The layer from prompts to tokens."""
        return self._linear_projection() if self.recipe.projection else nn.Identity()

    def _linear_projection(self) -> nn.Linear:
        projection = nn.Linear(self.prompts.shape[2], self.backbone.width)
        nn.init.kaiming_normal_(projection.weight, mode="fan_out")
        nn.init.zeros_(projection.bias)
        return projection

    @property
    def sets(self) -> list[Tensor]:
        """The prompts of each set, [P, d]."""
        sets = [prompts_PX for name in self.names for prompts_PX in getattr(self, name).unbind()]
        return sets if self.token_scale is None else [p * s for p, s in zip(sets, self.token_scale, strict=True)]

    @property
    def inits_from_images(self) -> bool:
        return super().inits_from_images or self.recipe.scaled or self.recipe.init in ("class_token", "tokens")

    @torch.no_grad()
    def init_tokens(self, batches: Sequence[Tensor], seed: int) -> None:
        """Measure the scale of the tokens before the first block of each set (``scaled``), or move prompts to their
        distribution, channel by channel (``class_token``, ``tokens``).

        Then the random initial values stay added: before the first block the class token is equal for all images, and
        equal prompts would stay equal.
        """
        blocks = self.first_blocks
        if self.token_scale is not None:
            self.token_scale.copy_(token_scales(self.backbone, batches, blocks))
        if self.recipe.init not in ("class_token", "tokens"):
            return
        found: list[list[Tensor]] = [[] for _ in blocks]  # tokens of each set's block
        for images_B3SS in batches:
            for number, tokens_BND in block_inputs(self.backbone, images_B3SS):
                if number in blocks:
                    read_BND = tokens_BND[:, :1] if self.recipe.init == "class_token" else tokens_BND
                    found[blocks.index(number)].append(_moments(read_BND))
        generator = torch.Generator().manual_seed(seed)
        for prompts_PD, moments in zip(self.sets, found, strict=True):
            count, sum_D, squares_D = torch.stack(moments).sum(0).unbind()
            mean_D = sum_D / count
            deviation_D = (squares_D / count - mean_D.square()).clamp_min(0).sqrt()
            noise_PD = torch.randn(prompts_PD.shape, generator=generator).to(mean_D)
            prompts_PD.add_((mean_D + deviation_D * noise_PD).to(prompts_PD))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        tokens_BND, widths = self.backbone.embed(self.prompted_images(images_B3SS)), self.backbone.widths
        prompts = [self._embedded(prompts_PX) for prompts_PX in self.sets] if self.set_of_block else []
        present = 0  # prompt tokens in the stream
        for number, block in enumerate(self.backbone.blocks):
            if widths[number] != widths[number - 1]:  # merging patches has dropped them
                present = 0
            if number in self.set_of_block:
                tokens_BND = self._write(tokens_BND, prompts[self.set_of_block[number]], present)
                present = 0 if self.recipe.location.startswith("add") else self.recipe.prompts
            elif present and not self.recipe.expand:
                tokens_BND, present = self._without(tokens_BND, present), 0
            tokens_BND = self.backbone.run_block(block, tokens_BND)
        return self.classify(self.backbone.pool(self.backbone.norm(tokens_BND), self.recipe.pooling, present))

    def prompted_images(self, images_B3SS: Tensor) -> Tensor:
        """The images that the backbone embeds; prompts in the image are part of them."""
        return images_B3SS

    def _per_image(self, prompts_PX: Tensor, images: int) -> Tensor:
        """Prompts repeated for each image, with separate dropout."""
        return F.dropout(prompts_PX.expand(images, -1, -1), self.recipe.dropout, self.training)

    def _embedded(self, prompts_PX: Tensor) -> Tensor:
        """Prompts of one set as tokens [P, D]."""
        return self.projection(prompts_PX)

    def _without(self, tokens_BND: Tensor, present: int) -> Tensor:
        prefix = self.backbone.prefix
        return torch.cat([tokens_BND[:, :prefix], tokens_BND[:, prefix + present :]], dim=1)

    def _write(self, tokens_BND: Tensor, prompts_PD: Tensor, present: int) -> Tensor:
        """Put prompts after the prefix tokens, replacing the ``present`` ones that are there, or add them."""
        prefix = self.backbone.prefix
        prompts_BPD = self._per_image(prompts_PD, tokens_BND.shape[0])
        if self.recipe.location.startswith("add"):
            return tokens_BND + prompts_BPD.to(tokens_BND.dtype)
        return _Replace.apply(tokens_BND, prompts_BPD.to(tokens_BND.dtype), prefix, present)


class _Replace(torch.autograd.Function):
    """Tokens [B, N, D] with the P prompts in place of the ``present`` tokens after the first ``prefix``.

    One copy each way: autograd's two slices would each pad their gradient to all tokens, and add. Forward does not
    write into the block's output, which belongs to whoever computed it (compiled blocks may keep it for backward); that
    copy is the smaller part.
    """

    @staticmethod
    def forward(ctx: Any, tokens_BND: Tensor, prompts_BPD: Tensor, prefix: int, present: int) -> Tensor:
        ctx.prefix, ctx.present, ctx.prompts = prefix, present, prompts_BPD.shape[1]
        return torch.cat([tokens_BND[:, :prefix], prompts_BPD, tokens_BND[:, prefix + present :]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        before, of_prompts, after = gradients[0].tensor_split([ctx.prefix, ctx.prefix + ctx.prompts], dim=1)
        if not ctx.needs_input_grad[0]:
            return None, of_prompts, None, None
        replaced = before.new_zeros(len(before), ctx.present, before.shape[2])
        return torch.cat([before, replaced, after], dim=1), of_prompts, None, None


def _moments(tokens_BND: Tensor) -> Tensor:
    """Count, sum and sum of squares for each channel: float64 [3, D]."""
    tokens_XD = tokens_BND.flatten(0, 1).double()
    return torch.stack([torch.full_like(tokens_XD[0], len(tokens_XD)), tokens_XD.sum(0), tokens_XD.square().sum(0)])


def _check_for_swin(recipe: VPTConfig) -> None:
    """Raises UserError for settings that need the same width in all blocks, or a ViT's embedding."""
    settings = recipe.model_dump(mode="json")
    for key, wanted, why in (
        ("location", "prepend", "on Swin prompts are prepended to the patches of each window"),
        ("projection", None, "on Swin the prompts of each stage have another width"),
        ("shared", False, "on Swin the prompts of each stage have another width"),
        ("extra_trainable", [], "the method of that name does not support Swin"),
    ):
        if settings[key] != wanted:
            raise UserError(f"method.{key} = {settings[key]}: {why}; leave it out")

"""Visual Prompt Tuning (Jia et al., ECCV 2022, arXiv 2203.12119). A writer.

B batch, N tokens, P prompts, D width, d width of a prompt before its projection, L blocks, R prefix tokens, G side of a
patch in pixels, X numbers of a prompt: d, or of pixels 3 G G; S image side, T side of an image with a frame.
"""

import math
from collections.abc import Iterable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.methods.base import Method
from dist_vpt.methods.bias import Biases
from dist_vpt.methods.cls import ClassToken
from dist_vpt.methods.config import VPTConfig
from dist_vpt.methods.hooks import replace_output


class VPT(Method):
    """Prompts p [sets, P, d]: set i goes in before prompted block i (shallow: one set; shared: two).

    On Swin, where D grows from stage to stage, a tensor holds the sets of a stage. Prompts beside the image are one
    set: the pixels of a frame [3, 4 P (T - P)], or of P channels patch by patch [N - R, P G G].
    """

    on_swin = True
    prompts: nn.Parameter  # where one tensor holds them all

    def __init__(self, recipe: VPTConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        if isinstance(backbone, SwinBackbone):
            _check_for_swin(recipe)
        also: dict[str, nn.Module] = {}  # made first: they start at the weights in float32
        if "bias" in recipe.extra_trainable:
            also["biases"] = Biases(backbone)
        if "cls" in recipe.extra_trainable:
            also["class_token"] = ClassToken(backbone)
        super().__init__(backbone, classes, compute)
        for name, module in also.items():
            self.add_module(name, module)
        self.recipe = recipe
        if recipe.init == "class_token" and getattr(backbone.stem, "cls_token", None) is None:
            raise UserError("method.init = class_token: the backbone has none; set method.init=tokens")
        beside = recipe.location in ("pad", "below")
        self.set_of_block = {} if beside else _schedule(recipe, len(backbone.blocks))
        self.first_blocks = [
            min(block for block, of in self.set_of_block.items() if of == each)
            for each in sorted(set(self.set_of_block.values()))
        ]
        last = max(self.set_of_block, default=0)
        if recipe.pooling in ("prompt_pool", "imgprompt_pool") and backbone.widths[last] != backbone.width:
            raise UserError(
                f"method.pooling = {recipe.pooling}: the last prompts go in before block {last}, and patches are "
                "merged after it, which drops prompts; set method.pooling=original"
            )
        stages = [(width, len(list(sets))) for width, sets in groupby(backbone.widths[n] for n in self.first_blocks)]
        stages = stages or [(backbone.width, 1)]
        self.names = ["prompts"] if len(stages) == 1 else [f"prompts_{stage}" for stage in range(len(stages))]
        for name, (width, sets) in zip(self.names, stages, strict=True):
            # Xavier-uniform, of a patch's pixels; a frame starts as any colours.
            bound = math.sqrt(6.0 / (3 * math.prod(backbone.patch_size) + (recipe.projection or width)))
            least, most = (0.0, 1.0) if recipe.location == "pad" else (-bound, bound)
            prompts = torch.empty(sets, *_shape(recipe, backbone, width)).uniform_(least, most)
            self.register_parameter(name, nn.Parameter(prompts))
        self.projection: nn.Module = nn.Identity()
        if recipe.projection or recipe.location == "below":
            self.projection = nn.Linear(self.prompts.shape[2], backbone.width)
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
            nn.init.zeros_(self.projection.bias)
        if recipe.location == "below":
            replace_output(backbone.stem.patch_embed.proj, self._with_channels)

    @property
    def sets(self) -> list[Tensor]:
        """The prompts of each set, [P, d]."""
        return [prompts_PX for name in self.names for prompts_PX in getattr(self, name).unbind()]

    @property
    def starts_on_images(self) -> bool:
        return self.recipe.init != "random"

    @torch.no_grad()
    def start(self, batches_B3SS: Iterable[Tensor], seed: int) -> None:
        """Move prompts to where tokens are before the first block that each set is written to, channel by channel.

        What they were is added: an image's class token is the same for all before the first block, and equal prompts
        would stay equal.
        """
        backbone, blocks = self.backbone, self.first_blocks
        found: list[list[Tensor]] = [[] for _ in blocks]  # tokens of each set's block
        for images_B3SS in batches_B3SS:
            tokens_BND = backbone.embed(images_B3SS)
            for number in range(blocks[-1] + 1):
                if number in blocks:
                    read_BND = tokens_BND[:, :1] if self.recipe.init == "class_token" else tokens_BND
                    found[blocks.index(number)].append(_moments(read_BND))
                tokens_BND = backbone.run_block(backbone.blocks[number], tokens_BND)
        generator = torch.Generator().manual_seed(seed)
        for prompts_PD, moments in zip(self.sets, found, strict=True):
            count, sum_D, squares_D = torch.stack(moments).sum(0).unbind()
            mean_D = sum_D / count
            deviation_D = (squares_D / count - mean_D.square()).clamp_min(0).sqrt()
            noise_PD = torch.randn(prompts_PD.shape, generator=generator).to(mean_D)
            prompts_PD.add_((mean_D + deviation_D * noise_PD).to(prompts_PD))

    def forward(self, images_B3SS: Tensor) -> Tensor:
        tokens_BND, widths = self.backbone.embed(self.framed(images_B3SS)), self.backbone.widths
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

    def framed(self, images_B3SS: Tensor) -> Tensor:
        """Images with the trained frame around them, where there is one, [B, 3, T, T]."""
        if self.recipe.location != "pad":
            return images_B3SS
        size, width = images_B3SS.shape[-1], self.recipe.prompts
        frame_B3X = 255 * self._drawn(self.prompts[0], len(images_B3SS))
        row, column = width * (size + 2 * width), width * size
        top, left, right, bottom = frame_B3X.split([row, column, column, row], dim=2)
        left, right = left.unflatten(2, (size, width)), right.unflatten(2, (size, width))
        middle_B3ST = torch.cat([left, images_B3SS.to(frame_B3X.dtype), right], dim=3)
        return torch.cat([top.unflatten(2, (width, -1)), middle_B3ST, bottom.unflatten(2, (width, -1))], dim=2)

    def _with_channels(self, _: Tensor, patches_BDIJ: Tensor) -> Tensor:
        """Embedded patches, with what their part of the further channels comes to."""
        further_BND = self._drawn(self.projection(self.prompts[0]), len(patches_BDIJ))
        return patches_BDIJ + further_BND.transpose(1, 2).to(patches_BDIJ.dtype).view(patches_BDIJ.shape)

    def _drawn(self, prompts_PX: Tensor, images: int) -> Tensor:
        """Prompts for each image, with its own dropout."""
        return F.dropout(prompts_PX.expand(images, -1, -1), self.recipe.dropout, self.training)

    def _embedded(self, prompts_PX: Tensor) -> Tensor:
        """Prompts of one set as tokens [P, D]; pixels go through the backbone's own patch embedding."""
        if self.recipe.location != "prepend-pixel":
            return self.projection(prompts_PX)
        embed, side = self.backbone.stem.patch_embed, self.backbone.patch_size
        patches_P3GG = prompts_PX.to(self.backbone.dtype).unflatten(1, (3, *side))
        return embed.norm(embed.proj(patches_P3GG).flatten(1))

    def _without(self, tokens_BND: Tensor, present: int) -> Tensor:
        prefix = self.backbone.prefix
        return torch.cat([tokens_BND[:, :prefix], tokens_BND[:, prefix + present :]], dim=1)

    def _write(self, tokens_BND: Tensor, prompts_PD: Tensor, present: int) -> Tensor:
        """Put prompts after the prefix tokens, in the place of the ``present`` ones that are there, or add them."""
        prefix = self.backbone.prefix
        prompts_BPD = self._drawn(prompts_PD, len(tokens_BND))
        if self.recipe.location.startswith("add"):
            return tokens_BND + prompts_BPD.to(tokens_BND.dtype)
        return torch.cat(
            [tokens_BND[:, :prefix], prompts_BPD.to(tokens_BND.dtype), tokens_BND[:, prefix + present :]],
            dim=1,
        )


def _moments(tokens_BND: Tensor) -> Tensor:
    """How many, their sum and the sum of their squares, for each channel: float64 [3, D]."""
    tokens_XD = tokens_BND.flatten(0, 1).double()
    return torch.stack([torch.full_like(tokens_XD[0], len(tokens_XD)), tokens_XD.sum(0), tokens_XD.square().sum(0)])


def _shape(recipe: VPTConfig, backbone: Backbone, width: int) -> tuple[int, int]:
    """Of one set: how many, and the numbers of each."""
    patch, numbers = math.prod(backbone.patch_size), recipe.projection or width
    return {
        "prepend": (recipe.prompts, numbers),
        "add": (backbone.tokens, numbers),
        "add-1": (1, numbers),
        "prepend-pixel": (recipe.prompts, 3 * patch),
        "pad": (3, 4 * recipe.prompts * (backbone.image_size - recipe.prompts)),
        "below": (backbone.patches, recipe.prompts * patch),
    }[recipe.location]


def _check_for_swin(recipe: VPTConfig) -> None:
    """Raises UserError for what needs the same width in all blocks, or a ViT's embedding."""
    settings = recipe.model_dump(mode="json")
    for key, wanted, why in (
        ("location", "prepend", "on Swin prompts are prepended to the patches of each window"),
        ("projection", None, "on Swin the prompts of each stage have another width"),
        ("shared", False, "on Swin the prompts of each stage have another width"),
        ("extra_trainable", [], "the method of that name is not for Swin"),
    ):
        if settings[key] != wanted:
            raise UserError(f"method.{key} = {settings[key]}: {why}; leave it out")


def _schedule(recipe: VPTConfig, blocks: int) -> dict[int, int]:
    """Block number -> number of the prompt set that is written before it."""
    if not recipe.deep:
        return {0: 0}
    layers = blocks if recipe.layers is None else recipe.layers
    if layers > blocks:
        raise UserError(f"method.layers = {layers}: the backbone has {blocks} blocks; use at most that many")
    first = 0 if recipe.prompted_blocks == "first" else blocks - layers
    return {first + i: min(i, 1) if recipe.shared else i for i in range(layers)}

"""Visual Query Tuning (Tu et al., CVPR 2023, arXiv 2212.03220). A reader.

B batch, N tokens, Q queries of a block (of all trials together where several are read at once), D width, H heads,
E = D / H, L blocks that are read, T trials, F features.

Per block, query tokens z attend to the image's tokens, not to each other, and the image's tokens do not see them:

    z' = z + ls1(proj(softmax(q(norm1(z)) k^T / sqrt(E)) v))        z'' = z' + ls2(mlp(norm2(z')))

with k and v those of n, the image's tokens as the block's attention sees them. The features are the backbone's own,
and z'' of each block. Two equal forms compute the attention:

- ``projected``: k and v are computed from n, without autograd.
- ``absorbed``: a head's score is k.q = n.(W_k^T q) up to a number that cancels in the softmax, and the weights sum to
  one, so that sum(p v) = W_v sum(p n) + b_v: no key and no value is ever computed, and n alone is kept for backward.
  Under qk-norm each key has a scale of its own, which the stream brings along.

The head may read some of the features alone (``keep``): which ones is an index beside the trained tensors.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dist_vpt.backbones.backbone import Backbone
from dist_vpt.backbones.seams import Seams, centres, has_key_norm, open_block, widened
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream import Observed, Reads
from dist_vpt.methods.base import MethodSettings, Reader

Form = Literal["auto", "absorbed", "projected"]


class VQTRecipe(MethodSettings):
    """Query tokens that read the frozen blocks, and a linear head on what they found."""

    name: Literal["vqt"] = Field("vqt", description="Visual Query Tuning")
    queries: int = Field(1, ge=1, description="Q: query tokens of a block")
    blocks: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the blocks that are read, from 0; null: all of them"
    )
    pooling: Literal["none", "mean", "weighted"] = Field(
        "none", description="of a block's queries: kept side by side, their mean, or a learned weighted sum"
    )
    normalise: bool = Field(True, description="bring each block's features, and the backbone's own, to length 1")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the queries, drawn for every image")
    form: Form = Field("auto", description="how attention is computed; auto: the one with fewer operations")
    keep: int | None = Field(
        None,
        ge=1,
        description="features that the head reads, which the adapters name (`dist-vpt compress` chooses them); "
        "null: all of them",
    )

    @model_validator(mode="after")
    def _blocks_rise(self) -> Self:
        if self.blocks is not None and (list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0):
            raise ValueError(f"blocks = {list(self.blocks)}: must be rising block numbers from 0; sort them")
        return self


class VQT(Reader):
    """Queries [L, Q, D], with ``weighted`` pooling their weights [L, Q], and the head.

    ``kept`` [keep] (int64, rising) are the features that the head reads, None: all; adapters bring them.
    """

    kept: Tensor | None

    def __init__(self, recipe: VQTRecipe, backbone: Backbone, classes: int, compute: torch.dtype):
        depth = len(backbone.blocks)
        blocks = tuple(range(depth)) if recipe.blocks is None else recipe.blocks
        if blocks[-1] >= depth:
            raise UserError(f"method.blocks: {blocks[-1]}: the backbone's blocks are 0 to {depth - 1}; leave it out")
        groups = recipe.queries if recipe.pooling == "none" else 1
        found = backbone.width * (1 + len(blocks) * groups)
        if recipe.keep is not None and recipe.keep > found:
            raise UserError(f"method.keep = {recipe.keep}: there are {found} features to choose among; leave it out")
        super().__init__(backbone, classes, compute, features=recipe.keep or found)
        self.recipe, self.blocks, self.all_features = recipe, blocks, found
        self.register_buffer("kept", None if recipe.keep is None else torch.full((recipe.keep,), -1))
        seams = [open_block(backbone.blocks[number], number) for number in blocks]
        self.key_norm = any(has_key_norm(s) for s in seams)
        if self.key_norm and recipe.form == "absorbed":
            centres(seams[0].k_norm)  # refuses a norm that cannot be absorbed
        bound = math.sqrt(6.0 / (3 * math.prod(backbone.patch_size) + backbone.width))  # as VPT's prompts
        self.queries = nn.Parameter(torch.empty(len(blocks), recipe.queries, backbone.width).uniform_(-bound, bound))
        if recipe.pooling == "weighted":  # starts as the mean
            self.pool_weights = nn.Parameter(torch.full((len(blocks), recipe.queries), 1.0 / recipe.queries))

    @property
    def reads(self) -> Reads:
        return Reads(self.blocks, key_scales=self.key_norm and self.recipe.form != "projected")

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().adapter_tensors()
        if self.kept is not None:
            yield "kept", self.kept

    def train(self, mode: bool = True) -> Self:
        """Raises UserError where ``kept`` names no features: told here, once, and not for every batch."""
        if self.kept is not None:
            rises = bool((self.kept.diff() > 0).all()) and self.kept[0] >= 0 and self.kept[-1] < self.all_features
            if not rises:
                raise UserError(
                    f"method.keep = {self.recipe.keep}: adapters must name the kept features, rising numbers "
                    f"below {self.all_features}, and none do; `dist-vpt compress` makes such adapters; or leave it out"
                )
        return super().train(mode)

    def classify(self, features_BF: Tensor) -> Tensor:
        """The head on those of the features that it reads."""
        return super().classify(features_BF if self.kept is None else features_BF.index_select(1, self.kept))

    def features(self, observed: Observed) -> Tensor:
        """All features [B, F] of the images, of which the head may read some alone."""
        return self.features_of_many([self], observed)[0]

    def read(self, observed: Observed) -> Tensor:
        return self.read_many([self], observed)[0]

    @classmethod
    def read_many(  # type: ignore[override]
        cls, readers: Sequence["VQT"], observed: Observed, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        found = cls.features_of_many(readers, observed, seeds)
        return [reader.classify(features_BF) for reader, features_BF in zip(readers, found, strict=True)]

    @classmethod
    def features_of_many(
        cls, readers: Sequence["VQT"], observed: Observed, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """The features [B, F] of each reader, from one reading of the stream."""
        first = readers[0]
        asked = []  # queries of each reader, [L, Q_t, D] or with dropout [B, L, Q_t, D]
        for t, reader in enumerate(readers):
            if seeds is not None:
                torch.manual_seed(seeds[t])
            asked.append(reader._dropped(len(observed.pooled)))
        if any(queries.ndim == 4 for queries in asked):
            asked = [queries.expand(len(observed.pooled), -1, -1, -1) for queries in asked]
        queries_LQD = torch.cat(asked, dim=-2)
        sizes = [reader.recipe.queries for reader in readers]
        form, answers = first._form(observed, sum(sizes)), []
        for i, (number, z_QD) in enumerate(zip(first.blocks, queries_LQD.unbind(-3), strict=True)):
            seams = open_block(first.backbone.blocks[number], number)
            scale_BNH = observed.key_scales[i] if observed.key_scales else None
            answers.append(answer(seams, z_QD, observed.normed[i], scale_BNH, form))
        answers_BLQD = torch.stack(answers, dim=1).to(queries_LQD.dtype)
        return [
            reader._features(observed.pooled, mine_BLQD)
            for reader, mine_BLQD in zip(readers, answers_BLQD.split(sizes, dim=2), strict=True)
        ]

    def _dropped(self, images: int) -> Tensor:
        if not (self.training and self.recipe.dropout):
            return self.queries
        return F.dropout(self.queries.expand(images, -1, -1, -1), self.recipe.dropout)

    def _form(self, observed: Observed, queries: int) -> str:
        if self.recipe.form != "auto":
            return self.recipe.form
        heads = open_block(self.backbone.blocks[self.blocks[0]], self.blocks[0]).heads
        return cheaper_form(queries, heads, self.backbone.width)

    def _features(self, pooled_BD: Tensor, answers_BLQD: Tensor) -> Tensor:
        """The backbone's features and each block's, brought to length 1, side by side: [B, F]."""
        if self.recipe.pooling == "mean":
            answers_BLQD = answers_BLQD.mean(2, keepdim=True)
        elif self.recipe.pooling == "weighted":
            answers_BLQD = (answers_BLQD * self.pool_weights[..., None]).sum(2, keepdim=True)
        kinds = [pooled_BD.to(answers_BLQD.dtype).unsqueeze(1), answers_BLQD.flatten(2)]  # one group, and L of them
        if self.recipe.normalise:
            kinds = [F.normalize(groups, dim=2) for groups in kinds]
        return torch.cat([groups.flatten(1) for groups in kinds], dim=1)


def cheaper_form(queries: int, heads: int, width: int) -> str:
    """The form with fewer operations in a training step.

    Per token of the image, absorbed scores and sums take 2 D H Q multiplications forward and as many backward;
    projected ones 2 D Q each way, and 2 D^2 for keys and values, which need no backward.
    """
    return "absorbed" if 4 * heads * queries < 2 * width + 4 * queries else "projected"


def answer(seams: Seams, z_QD: Tensor, normed_BND: Tensor, key_scale_BNH: Tensor | None, form: str) -> Tensor:
    """z'' [B, Q, D]: a block's outputs for queries z, [Q, D] or one set for each image, [B, Q, D]."""
    z_QD = z_QD.to(normed_BND.dtype)
    q_QHE = seams.q_norm(seams.project(0, seams.norm1(z_QD))) * seams.scale
    attend = _attend_absorbed if form == "absorbed" else _attend_projected
    heads_BQHE = attend(seams, q_QHE, normed_BND, key_scale_BNH)
    z_BQD = z_QD + seams.ls1(seams.proj(seams.attn_norm(heads_BQHE.flatten(-2))))
    return z_BQD + seams.ls2(seams.mlp(seams.norm2(z_BQD)))


def _attend_absorbed(seams: Seams, q_QHE: Tensor, n_BND: Tensor, scale_BNH: Tensor | None) -> Tensor:
    weight_ED, bias_E = seams.weights(1)
    heads, images, per_image = seams.heads, len(n_BND), q_QHE.ndim == 4
    if has_key_norm(seams):  # its scale of the channels goes to the query, its mean's removal too (that is symmetric)
        q_QHE = q_QHE * seams.k_norm.weight if seams.k_norm.weight is not None else q_QHE
        q_QHE = q_QHE - q_QHE.mean(-1, keepdim=True) if centres(seams.k_norm) else q_QHE
    u_QHD = torch.einsum("...qhe,hed->...qhd", q_QHE, weight_ED.unflatten(0, (heads, -1)))
    u_XD = u_QHD.flatten(-3, -2)  # X = Q * H
    if per_image:
        scores_BNX = n_BND @ u_XD.transpose(1, 2)
    else:
        scores_BNX = (n_BND.flatten(0, 1) @ u_XD.T).unflatten(0, n_BND.shape[:2])
    if has_key_norm(seams):
        assert scale_BNH is not None
        scores_BNX = widened(scores_BNX)
        if bias_E is not None:  # does not cancel: each token's scale multiplies it
            of_bias_QH = (q_QHE * bias_E.unflatten(0, (heads, -1))).sum(-1)
            scores_BNX = scores_BNX + of_bias_QH.flatten(-2).unsqueeze(-2)
        scores_BNX = (scores_BNX.unflatten(2, (-1, heads)) * widened(scale_BNH).unsqueeze(2)).flatten(2)
    p_BNX = scores_BNX.softmax(dim=1).to(n_BND.dtype)  # of half precision: float32 inside, and nothing wider is kept
    c_BXD = p_BNX.transpose(1, 2) @ n_BND
    weight_ED, bias_E = seams.weights(2)
    c_HYD = c_BXD.unflatten(1, (-1, heads)).permute(2, 0, 1, 3).flatten(1, 2)  # Y = B * Q
    a_HYE = c_HYD @ weight_ED.unflatten(0, (heads, -1)).transpose(1, 2)
    a_BQHE = a_HYE.unflatten(1, (images, -1)).permute(1, 2, 0, 3)
    return a_BQHE if bias_E is None else a_BQHE + bias_E.unflatten(0, (heads, -1))


def _attend_projected(seams: Seams, q_QHE: Tensor, n_BND: Tensor, _: Tensor | None) -> Tensor:
    with torch.no_grad():
        k_BHNE = seams.k_norm(seams.project(1, n_BND)).transpose(1, 2)
        v_BHNE = seams.project(2, n_BND).transpose(1, 2)
    scores_BHQN = q_QHE.transpose(-3, -2) @ k_BHNE.transpose(2, 3)
    return (scores_BHQN.softmax(dim=-1) @ v_BHNE).transpose(1, 2)

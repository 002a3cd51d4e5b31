"""Visual Query Tuning (Tu et al., CVPR 2023, arXiv 2212.03220). A reader.

B batch, N tokens, Q queries of a block (of all readers together where several are read at once), D width, H heads,
E = D / H, L blocks that are read, T readers of a stack, F features.

Per block, query tokens z attend to the image's tokens, not to each other, and the image's tokens do not see them:

    z' = z + ls1(proj(softmax(q(norm1(z)) k^T / sqrt(E)) v))        z'' = z' + ls2(mlp(norm2(z')))

with k and v those of n, the normalized inputs of the block's attention. The features are the backbone's pooled
ones, and z'' of each block. Two equal forms compute the attention:

- ``projected``: k and v are computed from n, without autograd. Where the backbone has rotary positions it is the only
  form: each patch's key is turned by its position, the query is not. A stream that is cached for several trials holds
  k and v themselves if the memory suffices, and then this is by far the cheaper form; a single trial would keep twice
  the bytes of its batch for backward.
- ``absorbed``: a head's score is k.q = n.(W_k^T q) up to a number that cancels in the softmax, and the weights sum to
  one, so that sum(p v) = W_v sum(p n) + b_v: no key and no value is ever computed, and only n is kept for backward.
  With qk-norm each key has a scale, which is part of the stream.

The head may read a subset of the features (``keep``): an index beside the trained tensors lists them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_vpt.backbones.blocks import BlockParts, has_key_norm, keys_and_values, subtracts_mean, unpack_block, widened
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.base import Reader, chosen_blocks, classify_stack
from dist_vpt.methods.config_readers import VQTConfig
from dist_vpt.methods.stack import ReaderStack, Sources
from dist_vpt.methods.token_scale import init_scaled, token_scales


class VQT(Reader):
    """Queries [L, Q, D], with ``weighted`` pooling their weights [L, Q], and the head.

    ``kept`` [keep] (int64, increasing) are the features that the head reads, None: all; adapters contain them.
    """

    kept: Tensor | None
    token_scale: Tensor | None  # [L, 1, 1], which multiplies queries

    def __init__(self, recipe: VQTConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        blocks = chosen_blocks(recipe.blocks, backbone)
        groups = recipe.queries if recipe.pooling == "none" else 1
        found = backbone.width * (1 + len(blocks) * groups)
        if recipe.keep is not None and recipe.keep > found:
            raise UserError(f"method.keep = {recipe.keep}: there are {found} features; leave it out")
        super().__init__(backbone, classes, compute, head=recipe.head, features=recipe.keep or found)
        self.recipe, self.blocks, self.all_features = recipe, blocks, found
        self.register_buffer("kept", None if recipe.keep is None else torch.full((recipe.keep,), -1))
        parts = [unpack_block(backbone.blocks[number], number) for number in blocks]
        self.key_norm = any(has_key_norm(s) for s in parts)
        self.rotates = backbone.rotary is not None
        if self.rotates and recipe.form == "absorbed":
            raise UserError(
                f"method.form = absorbed: a {type(backbone.blocks[blocks[0]]).__name__} of the backbone turns each "
                "patch's key by its position, so that no product with the queries is the same for all patches; set "
                "method.form=auto"
            )
        if self.key_norm and recipe.form == "absorbed":
            subtracts_mean(parts[0].k_norm)  # raises for a norm that cannot be absorbed
        queries = torch.empty(len(blocks), recipe.queries, backbone.width)
        if recipe.init == "scaled":
            init_scaled(queries)
        else:
            bound = math.sqrt(6.0 / (3 * math.prod(backbone.patch_size) + backbone.width))  # as VPT's prompts
            queries.uniform_(-bound, bound)
        self.queries = nn.Parameter(queries)
        self.register_buffer("token_scale", torch.ones(len(blocks), 1, 1) if recipe.init == "scaled" else None)
        if recipe.pooling == "weighted":  # starts as the mean
            self.pool_weights = nn.Parameter(torch.full((len(blocks), recipe.queries), 1.0 / recipe.queries))

    @property
    def spec(self) -> StreamSpec:
        if self.recipe.form == "projected":
            return StreamSpec(self.blocks, keys=True)
        return StreamSpec(self.blocks, key_scales=self.key_norm and not self.rotates)

    @property
    def shared_spec(self) -> StreamSpec:
        return self.spec if self.recipe.form == "absorbed" else StreamSpec(self.blocks, keys=True)

    @property
    def scaled_queries(self) -> Tensor:
        """The query tokens [L, Q, D]."""
        return self.queries if self.token_scale is None else self.queries * self.token_scale

    @property
    def inits_from_images(self) -> bool:
        return super().inits_from_images or self.token_scale is not None

    @torch.no_grad()
    def init_tokens(self, batches: Sequence[Tensor], seed: int) -> None:
        if self.token_scale is not None:
            self.token_scale.copy_(token_scales(self.backbone, batches, self.blocks).view(-1, 1, 1))

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().adapter_tensors()
        if self.kept is not None:
            yield "kept", self.kept

    def train(self, mode: bool = True) -> Self:
        """Raises UserError if ``kept`` lists no features: checked here once, not for every batch."""
        if self.kept is not None:
            rises = bool((self.kept.diff() > 0).all()) and self.kept[0] >= 0 and self.kept[-1] < self.all_features
            if not rises:
                raise UserError(
                    f"method.keep = {self.recipe.keep}: adapters must list the kept features, increasing numbers "
                    f"below {self.all_features}; use adapters of `dist-vpt compress`, or leave it out"
                )
        return super().train(mode)

    def classify(self, features_BF: Tensor) -> Tensor:
        """The head on the features that it reads."""
        return super().classify(features_BF if self.kept is None else features_BF.index_select(1, self.kept))

    def stream_features(self, stream: StreamOutput) -> Tensor:
        """All features [B, F] of the images, of which the head may read a subset."""
        return self.stream_features_of_stacks([ReaderStack.of([self])], stream, [None])[0].squeeze(1)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(self.stream_features(stream))

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        logits = []
        for stack, features_BTF in zip(stacks, cls.stream_features_of_stacks(stacks, stream, sources), strict=True):
            if "kept" in stack.fixed:
                features_BTF = torch.take_along_dim(features_BTF, stack.fixed["kept"].unsqueeze(0), 2)  # noqa: PLW2901
            logits.append(classify_stack(stack, features_BTF.transpose(0, 1)))
        return logits

    @classmethod
    def stream_features_of_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        """The features [B, T, F] of each stack's readers, from one pass over the stream."""
        first = cast(VQT, stacks[0].readers[0])
        images = stream.pooled.shape[0]
        runs = [run for stack, own in zip(stacks, sources, strict=True) for run in _runs(stack, images, own)]
        sizes = [math.prod(stack.trained["queries"].shape[::2]) for stack in stacks]  # T * Q
        outputs = []  # for each block one of each stack, [B, T * Q, D]; one tensor of all blocks would be large
        for i, number in enumerate(first.blocks):
            z_QD = _queries_of(runs, i)
            parts = unpack_block(first.backbone.blocks[number], number)
            attention = first._attention(parts, stream, i, sum(sizes))
            outputs.append(query_outputs(parts, z_QD.to(stream.pooled.dtype), attention).split(sizes, dim=1))
        return [
            first._features(stack, stream.pooled, of_stack)
            for stack, of_stack in zip(stacks, zip(*outputs, strict=True), strict=True)
        ]

    @property
    def _dropout(self) -> float:
        return self.recipe.dropout if self.training else 0.0

    def mask(self, images: int, source: torch.Generator | None = None) -> Tensor | None:
        """Factors of the queries [B, L, Q, D], 0 or 1 / (1 - dropout), newly drawn; None: no dropout."""
        if not self._dropout:
            return None
        shape, device = (images, *self.queries.shape), self.queries.device
        kept_BLQD = torch.rand(shape, generator=source, device=device) >= self._dropout
        return kept_BLQD.to(self.queries.dtype) / (1 - self._dropout)

    def _attention(self, parts: BlockParts, stream: StreamOutput, i: int, queries: int) -> "Attention":
        """The attention of this many queries to the i-th block that is read."""
        if stream.keys:
            return partial(_attend_projected, stream.keys[i], stream.values[i])
        normed_BND = stream.normed[i]
        auto = self.recipe.form == "auto" and cheaper_form(queries, parts.heads, self.backbone.width) == "projected"
        if auto or self.rotates:
            with torch.no_grad():
                return partial(_attend_projected, *keys_and_values(parts, normed_BND, self.backbone.rotary))
        return partial(_attend_absorbed, parts, normed_BND, stream.key_scales[i] if stream.key_scales else None)

    def _features(self, stack: ReaderStack, pooled_BD: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The backbone's features and the queries' outputs of each block [B, T * Q, D], each scaled to length 1.

        [B, T, F], in as few passes over memory as possible: with many readers they take a large part of a step.
        """
        readers, width = len(stack.readers), pooled_BD.shape[1]
        groups = [pooled_BD.to(self.queries.dtype).unsqueeze(1).expand(-1, readers, -1)]
        groups += [self._pool(stack, i, z_BXD.unflatten(1, (readers, -1))) for i, z_BXD in enumerate(outputs)]
        features_BTF = torch.cat(groups, dim=2)  # also widens outputs in half precision
        if not self.recipe.normalize:
            return features_BTF
        pieces_YCD = features_BTF.flatten(0, 1).unflatten(1, (-1, width))  # one, then equally many of each block
        return _UnitLength.apply(pieces_YCD, len(outputs)).view_as(features_BTF)

    def _pool(self, stack: ReaderStack, i: int, z_BTQD: Tensor) -> Tensor:
        """Features of the i-th block that is read, [B, T, F']."""
        if self.recipe.pooling == "mean":
            return z_BTQD.mean(2, dtype=self.queries.dtype)
        if self.recipe.pooling == "weighted":
            return (z_BTQD * stack.trained["pool_weights"][:, i].unsqueeze(2)).sum(2)
        return z_BTQD.flatten(2)


Attention = Callable[[Tensor], Tensor]  # q [B, Q, H, E] or [Q, H, E], scaled -> heads' outputs [B, Q, H, E]


def cheaper_form(queries: int, heads: int, width: int) -> str:
    """The form with fewer operations in a training step on a stream that holds no keys and values.

    Per token of the image, absorbed scores and sums take 2 D H Q multiplications forward and as many backward;
    projected ones 2 D Q each way, and 2 D^2 for keys and values, which need no backward.
    """
    return "absorbed" if 4 * heads * queries < 2 * width + 4 * queries else "projected"


class _UnitLength(torch.autograd.Function):
    """x [B, 1 + L P, D] scaled to length 1 by groups: the first row is a group, then P rows each.

    y = x / |x|, dx = (dy - y (y . dy)) / |x|: half the passes of autograd's.
    """

    @staticmethod
    def forward(ctx: Any, x_BCD: Tensor, groups: int) -> Tensor:
        ctx.groups = groups
        squares_BC = torch.linalg.vector_norm(x_BCD, dim=2).square()
        over_BC1 = _group_sums(squares_BC, groups).sqrt().clamp_min(1e-12).reciprocal().unsqueeze(2)
        y_BCD = x_BCD * over_BC1
        ctx.save_for_backward(y_BCD, over_BC1)
        return y_BCD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        y_BCD, over_BC1 = ctx.saved_tensors
        along_BC = _group_sums((gradients[0] * y_BCD).sum(2), ctx.groups)
        return torch.addcmul(gradients[0], y_BCD, along_BC.unsqueeze(2), value=-1).mul_(over_BC1), None


def _group_sums(x_BC: Tensor, groups: int) -> Tensor:
    """For each number the sum of its group."""
    sums_BLP = x_BC[:, 1:].unflatten(1, (groups, -1)).sum(2, keepdim=True).expand(-1, -1, (x_BC.shape[1] - 1) // groups)
    return torch.cat([x_BC[:, :1], sums_BLP.flatten(1)], dim=1)


def _runs(stack: ReaderStack, images: int, sources: Sources) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Queries [T', L, Q, D] and mask [B, L, Q, D], or None, of adjacent readers that share a mask.

    They are equal in seed and dropout, also without ``sources``.
    """
    queries_TLQD = stack.trained["queries"]
    if "token_scale" in stack.fixed:
        queries_TLQD = queries_TLQD * stack.fixed["token_scale"]
    readers = cast(Sequence[VQT], stack.readers)
    used = [sources[t] if sources and reader._dropout else None for t, reader in enumerate(readers)]
    keys = [(source and source.seed, reader._dropout) for source, reader in zip(used, readers, strict=True)]
    lengths = [len(list(run)) for _, run in groupby(keys)]
    for run_TLQD, last in zip(queries_TLQD.split(lengths), accumulate(lengths), strict=True):
        source = used[last - 1]
        yield run_TLQD, readers[last - 1].mask(images, None if source is None else source.generator)


def _queries_of(runs: Sequence[tuple[Tensor, Tensor | None]], i: int) -> Tensor:
    """Queries of the i-th block that is read, of all readers concatenated: [Q, D], or with dropout [B, Q, D]."""
    images = {len(mask_BLQD) for _, mask_BLQD in runs if mask_BLQD is not None}
    pieces = []
    for queries_TLQD, mask_BLQD in runs:
        z_TQD = queries_TLQD[:, i]
        if mask_BLQD is not None:
            pieces.append((z_TQD * mask_BLQD[:, None, i]).flatten(1, 2))
        else:
            pieces.append(z_TQD.flatten(0, 1).expand(*images, -1, -1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)


def query_outputs(parts: BlockParts, z_QD: Tensor, attention: Attention) -> Tensor:
    """z'' [B, Q, D]: a block's outputs for queries z, [Q, D] or one set for each image, [B, Q, D]."""
    q_QHE = parts.q_norm(parts.project(0, parts.norm1(z_QD))) * parts.scale
    heads_BQHE = attention(q_QHE)
    z_BQD = z_QD + parts.ls1(parts.proj(parts.attn_norm(heads_BQHE.flatten(-2))))
    return z_BQD + parts.ls2(parts.mlp(parts.norm2(z_BQD)))


def _attend_absorbed(parts: BlockParts, n_BND: Tensor, scale_BNH: Tensor | None, q_QHE: Tensor) -> Tensor:
    weight_ED, bias_E = parts.weights(1)
    heads, per_image = parts.heads, q_QHE.ndim == 4
    if has_key_norm(parts):  # its scale of the channels goes to the query, and so does centering, which is symmetric
        q_QHE = q_QHE * parts.k_norm.weight if parts.k_norm.weight is not None else q_QHE
        q_QHE = q_QHE - q_QHE.mean(-1, keepdim=True) if subtracts_mean(parts.k_norm) else q_QHE
    u_QHD = _HeadLinear.apply(q_QHE, weight_ED.unflatten(0, (heads, -1)))
    u_XD = u_QHD.flatten(-3, -2)  # X = Q * H
    if per_image:
        scores_BXN = u_XD @ n_BND.transpose(1, 2)
    else:  # one matrix product for all tokens
        scores_BXN = (n_BND.flatten(0, 1) @ u_XD.T).unflatten(0, n_BND.shape[:2]).transpose(1, 2)
    if has_key_norm(parts):
        assert scale_BNH is not None
        scores_BXN = widened(scores_BXN)
        if bias_E is not None:  # does not cancel: each token's scale multiplies it
            of_bias_QH = (q_QHE * bias_E.unflatten(0, (heads, -1))).sum(-1)
            scores_BXN = scores_BXN + of_bias_QH.flatten(-2).unsqueeze(-1)
        scale_BHN = widened(scale_BNH).transpose(1, 2)
        scores_BXN = (scores_BXN.unflatten(1, (-1, heads)) * scale_BHN.unsqueeze(1)).flatten(1, 2)
    p_BXN = scores_BXN.softmax(dim=-1).to(n_BND.dtype)  # half precision: float32 inside, nothing wider is kept
    c_BQHD = (p_BXN @ n_BND).unflatten(1, (-1, heads))
    weight_ED, bias_E = parts.weights(2)
    a_BQHE = _HeadLinear.apply(c_BQHD, weight_ED.unflatten(0, (heads, -1)).transpose(1, 2))
    return a_BQHE if bias_E is None else a_BQHE + bias_E.unflatten(0, (heads, -1))


class _HeadLinear(torch.autograd.Function):
    """x [..., H, I] times frozen weights [H, I, O], head by head: [..., H, O].

    torch's operations use a layout with the heads first, and copy these large tensors to it and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_HIO: Tensor) -> Tensor:
        ctx.save_for_backward(weight_HIO)
        return _per_head(x, weight_HIO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_HIO,) = ctx.saved_tensors
        return _per_head(gradients[0], weight_HIO.transpose(1, 2)), None


def _per_head(x: Tensor, weight_HIO: Tensor) -> Tensor:
    # On a GPU a launch costs more than a copy; what is exported would have an operation for each head.
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return torch.einsum("...hi,hio->...ho", x, weight_HIO)
    x_YHI = x.flatten(0, -3)
    out_YHO = x.new_empty(*x_YHI.shape[:2], weight_HIO.shape[2])
    for h, weight_IO in enumerate(weight_HIO):
        torch.mm(x_YHI[:, h], weight_IO, out=out_YHO[:, h])
    return out_YHO.unflatten(0, x.shape[:-2])


def _attend_projected(k_BHNE: Tensor, v_BHNE: Tensor, q_QHE: Tensor) -> Tensor:
    """Fused, as in the backbone: in half precision the scores of forward stay float32, and on a GPU all."""
    q_BHQE = q_QHE.transpose(-3, -2).expand(k_BHNE.shape[0], -1, -1, -1)
    if q_BHQE.device.type != "cpu":
        return nn.functional.scaled_dot_product_attention(q_BHQE, k_BHNE, v_BHNE, scale=1.0).transpose(1, 2)
    return _AttendOnCPU.apply(q_BHQE, k_BHNE, v_BHNE).transpose(1, 2)


class _AttendOnCPU(torch.autograd.Function):
    """softmax(q k^T) v, of which only q has a gradient.

    There the fused backward would compute those of k and v as well, in several times the time. This one computes the
    probabilities again, from scores in the dtype of q, and forward keeps nothing else than its arguments.
    """

    @staticmethod
    def forward(ctx: Any, q_BHQE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> Tensor:
        ctx.save_for_backward(q_BHQE, k_BHNE, v_BHNE)
        return nn.functional.scaled_dot_product_attention(q_BHQE, k_BHNE, v_BHNE, scale=1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        q_BHQE, k_BHNE, v_BHNE = ctx.saved_tensors
        p_BHQN = (q_BHQE @ k_BHNE.transpose(2, 3)).softmax(dim=-1)
        dp_BHQN = gradients[0] @ v_BHNE.transpose(2, 3)
        return torch._softmax_backward_data(dp_BHQN, p_BHQN, -1, p_BHQN.dtype) @ k_BHNE, None, None

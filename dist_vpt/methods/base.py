"""The contract between a method and everything else.

B batch, S image side, N tokens, D width, F features, K classes, T trials.

A method has a backbone and trained tensors. It maps images to logits. Which parameters are trainable is decided here
by structure: the backbone's are frozen, the method's are not. What it computes is written so that torch.export can
record it for any number of images: B is ``x.shape[0]``, since ``len(x)`` would be recorded as a constant.

- A **writer** changes what the blocks compute, so gradients flow through them: it overrides ``forward``.
- A **reader** only reads what the frozen backbone computes anyway: it declares what it reads of the frozen stream
  (``spec``) and computes logits from that (``read``). The stream runs without autograd, may come from a cache, and
  serves any number of readers at once (``read_stacks``).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dist_vpt.backbones.group import naming_part
from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.joined import stream_of
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec
from dist_vpt.methods.config_base import HeadKind
from dist_vpt.methods.head import FeatureNorm, classification_head
from dist_vpt.methods.stack import RandomSource, ReaderStack, Sources, by_shape


class Method(nn.Module):
    """Images [B, 3, S, S] (uint8) -> logits [B, K] (float32)."""

    # Whether it supports Swin, where tokens attend within windows and are merged between stages.
    on_swin: ClassVar[bool] = False
    # Whether it reads several backbones together.
    joins: ClassVar[bool] = False
    # Names of buffers that belong to an adapter file: what was measured, and not trained.
    saved_buffers: ClassVar[tuple[str, ...]] = ("feature_norm.", "stream_norms.", "token_scale")

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        compute: torch.dtype,
        *,
        head: HeadKind,
        features: int | None = None,
        tuned: Iterable[nn.Module] = (),
    ):
        """``head``: the recipe's ``method.head``. ``features``: number that the head reads, D unless given.

        ``tuned``: modules of the backbone that are trained; they stay float32 and are computed under autocast.
        """
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        for module in tuned:
            module.requires_grad_(True)
        backbone.hold_in(compute)
        self.compute = compute
        self.head: nn.Module = classification_head(features or backbone.width, classes, head)
        self.feature_norm = FeatureNorm(features or backbone.width) if head == "standardized" else None

    @classmethod
    def check_backbone(cls, backbone: Backbone) -> None:
        """Raises UserError if the method does not support this backbone, or one of several."""
        if len(backbone.members) > 1 and not cls.joins:
            raise UserError(f"method.name = {cls.__name__.lower()}: has one backbone; use `backbone` for `backbones`")
        for number, member in enumerate(backbone.members):
            if not cls.on_swin and isinstance(member, SwinBackbone):
                with naming_part(backbone, number):
                    raise UserError(
                        f"method.name = {cls.__name__.lower()}: not on Swin, whose tokens attend within windows and "
                        "are merged between stages, so that there is no list of tokens that every block sees; choose "
                        "a ViT, or one of vpt, linear, knn, logistic, mlp, side and full"
                    )

    def __call__(self, images: Any) -> Tensor:
        """The logits of images; of several views of each, [B, V, 3, S, S], their mean over the views."""
        if isinstance(images, Tensor) and images.ndim == 5:
            return super().__call__(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)
        return super().__call__(images)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer gets."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def autocast(self, device: torch.device) -> torch.autocast:
        """Computes trained float32 weights in the recipe's precision.

        Without the cache of casts, which is empty when checkpointing recomputes a block in backward: selective
        checkpointing would take the additional casts for other operations than forward's.
        """
        enabled = self.compute != torch.float32
        return torch.autocast(device.type, self.compute, enabled=enabled, cache_enabled=False)

    @property
    def inits_from_images(self) -> bool:
        """Whether it is initialized from training images (``init_from_images``)."""
        return bool(self.norms)

    @property
    def norms(self) -> list[FeatureNorm]:
        """What measures the features, or tokens, of training images."""
        return [module for module in self.modules() if isinstance(module, FeatureNorm)]

    def init_from_images(self, batches: Sequence[Any], seed: int) -> None:
        """Initialize from what the backbone computes for batches of training images [B, 3, S, S]: tokens, then head.

        It is left in eval mode.
        """
        self.init_together([self], batches, seed)

    @staticmethod
    @torch.no_grad()
    def init_together(methods: Sequence["Method"], batches: Sequence[Any], seed: int) -> None:
        """Initialize a method, or readers on one backbone, for which each batch's frozen stream is computed once."""
        norms = [norm for method in methods for norm in method.norms]
        for method in methods:
            method.eval()
            method.init_tokens(batches, seed)
        for norm in norms:
            norm.start()
        first = methods[0]
        for batch in batches if norms else ():
            seen: Tensor | StreamOutput = batch
            if isinstance(first, Reader):
                seen = first.stream(batch)
            for method in methods:
                method.measure(seen)
        for norm in norms:
            norm.finish()

    def measure(self, images: Tensor | StreamOutput) -> None:
        """Show ``norms`` a batch of training images [B, 3, S, S], or of a reader their stream."""
        self(images)

    def penalty(self) -> Tensor | float:
        """What is added to the mean loss of an optimizer step, []; nothing for most methods."""
        return 0.0

    def init_tokens(self, batches: Sequence[Tensor], seed: int) -> None:
        """Initialize trained tokens from batches of training images [B, 3, S, S]; nothing for most methods."""

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of an adapter file: what is trained, and what was measured or selected for it."""
        yield from self.trainable()
        yield from ((name, t) for name, t in self.named_buffers() if name.startswith(self.saved_buffers))

    def size_like(self, tensors: Mapping[str, Tensor]) -> None:
        """Give adapters whose sizes the recipe does not tell those of ``tensors``, which are copied into them next."""

    def merged(self) -> dict[str, Tensor]:
        """Tensors that replace the backbone's in a plain timm model for equal outputs, under timm's names.

        Raises UserError if no plain timm model gives equal outputs.
        """
        raise UserError(self.unmergeable())

    @classmethod
    def unmergeable(cls) -> str:
        """Why a method that does not override ``merged`` cannot be merged."""
        return (
            f"a {cls.__name__} computes what no plain timm model does: only linear, logistic, full, partial, bias, "
            "cls, lora and ssf can be merged"
        )

    def features(self, images: Any) -> Tensor:
        """What the head reads of images [B, 3, S, S]: [B, F] float32, standardized where the head wants that."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            self(images)
        finally:
            hook.remove()
        return found[0]

    def classify(self, features_BF: Tensor) -> Tensor:
        """The head in float32 whatever the backbone's dtype: it is tiny, and its loss is minimized."""
        return self.head(self.standardized(features_BF.to(next(self.head.parameters()).dtype)))

    def standardized(self, features_BF: Tensor) -> Tensor:
        """Features as the head reads them."""
        return features_BF if self.feature_norm is None else self.feature_norm(features_BF)

    def plain_head(self) -> dict[str, Tensor]:
        """Tensors of a linear head with equal outputs that reads the features as they are."""
        tensors = {name: tensor.detach() for name, tensor in self.head.state_dict().items()}
        if self.feature_norm is not None:
            weight_KF = tensors["weight"] / self.feature_norm.std
            tensors |= {"weight": weight_KF, "bias": tensors["bias"] - weight_KF @ self.feature_norm.mean}
        return tensors


class Reader(Method):
    """A method that never changes the image's tokens: the backbone runs without autograd."""

    @property
    def spec(self) -> StreamSpec:
        """The tensors of the frozen stream that it reads besides the pooled features."""
        return StreamSpec()

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        """``spec`` of each of its backbones; that of the first is ``spec``."""
        return (self.spec,) * len(self.backbone.members)

    @property
    def shared_spec(self) -> StreamSpec:
        """The tensors to keep of a stream that many readers share: larger, but less is left to compute for each."""
        return self.spec

    def train(self, mode: bool = True) -> Self:
        """Leave the backbone as it is: its only mode is eval, and the readers of a sweep would all walk through it."""
        self.training = mode
        for module in self.children():
            if module is not self.backbone:
                module.train(mode)
        return self

    def stream(self, images: Any) -> StreamOutput:
        """The frozen stream of images, or of several backbones' images, unless they are one already."""
        return stream_of(self.backbone, images, self.specs)

    def states_of_each(self, states: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """``StreamOutput.states``, backbone by backbone."""
        ends = accumulate((len(spec.kept.get("states", ())) for spec in self.specs), initial=0)
        return [states[start:end] for start, end in pairwise(ends)]

    def read(self, stream: StreamOutput) -> Tensor:
        """Logits [B, K] from the stream of B images."""
        raise NotImplementedError

    @classmethod
    def read_many(
        cls, readers: Sequence["Reader"], stream: StreamOutput, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Logits [B, K] of each reader from one pass over the stream, each as if computed alone.

        ``seeds``: of the readers' random draws (dropout).
        """
        groups = by_shape(readers)
        stacks = [ReaderStack.of([readers[n] for n in group]) for group in groups]
        logits = dict[int, Tensor]()
        device = stream.pooled.device
        of_stacks: list[Sources] = [
            None if seeds is None else [RandomSource.seeded(seeds[n], device) for n in group] for group in groups
        ]
        for group, logits_TBK in zip(groups, cls.read_stacks(stacks, stream, of_stacks), strict=True):
            logits |= dict(zip(group, logits_TBK.unbind(), strict=True))
        return [logits[n] for n in range(len(readers))]

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        """Logits [T, B, K] of each stack's readers from one pass over the stream, each as if computed alone.

        ``sources``: of the random numbers (dropout) of each reader of each stack, seeded.

        Readers that are computed one by one (``one_by_one``) draw from torch's default source, with the same seeds.
        """
        return [torch.stack(list(_one_by_one(stack, stream, own))) for stack, own in zip(stacks, sources, strict=True)]

    @classmethod
    def one_by_one(cls) -> bool:
        """Whether ``read_stacks`` computes one reader after the other, as it does unless a method has its own."""
        return cls.read_stacks.__func__ is Reader.read_stacks.__func__  # type: ignore[attr-defined]

    @classmethod
    def penalties(cls, stack: ReaderStack) -> Tensor | None:
        """``penalty`` of each reader of a stack, [T]."""
        return None

    def forward(self, images: Any) -> Tensor:
        return self.read(self.stream(images))


class StackReader(Reader):
    """A reader whose layers are computed for many readers at once (``features_of_stacks``); alone a stack of one."""

    @classmethod
    def features_of_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        """What the heads of each stack's readers read, [T, B, F], from one pass; see ``read_stacks``."""
        raise NotImplementedError

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        features = cls.features_of_stacks(stacks, stream, sources)
        return [stack_heads(stack, features_TBF) for stack, features_TBF in zip(stacks, features, strict=True)]

    def read(self, stream: StreamOutput) -> Tensor:
        return self.read_stacks([ReaderStack.of([self])], stream, [None])[0].squeeze(0)

    def features(self, images: Any) -> Tensor:
        return self.features_of_stacks([ReaderStack.of([self])], self.stream(images), [None])[0].squeeze(0)


def chosen_blocks(blocks: tuple[int, ...] | None, backbone: Backbone) -> tuple[int, ...]:
    """Numbers of one backbone's blocks that are read; None: all. Raises UserError for one that it does not have."""
    depth = len(backbone.blocks)
    if blocks is not None and blocks[-1] >= depth:
        raise UserError(f"method.blocks: {blocks[-1]}: the backbone's blocks are 0 to {depth - 1}; leave it out")
    return tuple(range(depth)) if blocks is None else blocks


def classify_stack(stack: ReaderStack, features_TBF: Tensor) -> Tensor:
    """The linear heads of all readers of a stack, as ``Method.classify``, in one product: logits [T, B, K]."""
    return stack_heads(stack, standardize_stack(stack, features_TBF))


def standardize_stack(stack: ReaderStack, features_TBF: Tensor) -> Tensor:
    """Features as the heads read them, each reader's as ``Method.standardized``, in the heads' dtype."""
    features_TBF = features_TBF.to(stack.trained["head.weight"].dtype)
    if "feature_norm.mean" in stack.fixed:
        mean_TF, std_TF = stack.fixed["feature_norm.mean"], stack.fixed["feature_norm.std"]
        features_TBF = (features_TBF - mean_TF.unsqueeze(1)) / std_TF.unsqueeze(1)
    return features_TBF


def stack_heads(stack: ReaderStack, features_TBF: Tensor) -> Tensor:
    """The linear heads on features as they read them: logits [T, B, K]."""
    weight_TKF, bias_TK = stack.trained["head.weight"], stack.trained["head.bias"]
    # The weights come first so that their gradient has their layout, and need not be copied.
    return torch.baddbmm(bias_TK.unsqueeze(2), weight_TKF, features_TBF.transpose(1, 2)).transpose(1, 2)


def _one_by_one(stack: ReaderStack, stream: StreamOutput, sources: Sources) -> Iterator[Tensor]:
    for t, (reader, tensors) in enumerate(zip(stack.readers, stack.of_each(), strict=True)):
        if sources is not None:
            torch.manual_seed(sources[t].seed)
        yield functional_call(cast(Reader, reader), tensors, (stream,))

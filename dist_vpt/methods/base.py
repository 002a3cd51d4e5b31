"""The contract between a method and everything else.

B batch, S image side, N tokens, D width, F features, K classes, T trials.

A method owns a backbone and what is trained. It is called with images and gives logits; which of its parameters
are trainable is decided here by structure: the backbone's are frozen, the method's own are not.

- A **writer** changes what the blocks compute, so gradients flow through them: it overrides ``forward``.
- A **reader** only reads what the frozen backbone computes anyway: it says what it reads of the frozen stream
  (``reads``) and what it makes of that (``read``). The stream runs without autograd, may come from a cache, and
  serves any number of readers at once (``read_many``).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream


class Method(nn.Module):
    """Images [B, 3, S, S] (uint8) -> logits [B, K] (float32)."""

    # Whether it works on Swin, where tokens attend within windows, and are merged on the way.
    on_swin: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        compute: torch.dtype,
        features: int | None = None,
        tuned: Iterable[nn.Module] = (),
    ):
        """``features``: what the head reads of an image, D unless given.

        ``tuned``: modules of the backbone that are trained; they stay float32 and are computed under autocast.
        """
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        for module in tuned:
            module.requires_grad_(True)
        backbone.hold_in(compute)
        self.compute = compute
        self.head: nn.Module = classification_head(features or backbone.width, classes)

    @classmethod
    def check_backbone(cls, backbone: Backbone) -> None:
        """Raises UserError where the method cannot work on this backbone."""
        if isinstance(backbone, SwinBackbone) and not cls.on_swin:
            raise UserError(
                f"method.name = {cls.__name__.lower()}: not on Swin, whose tokens attend within windows and are merged "
                "between stages, so that there is no list of tokens that every block sees; choose a ViT, or one of "
                "vpt, linear, mlp, side and full"
            )

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimiser gets."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def autocast(self, device: torch.device) -> torch.autocast:
        """In which float32 weights that are tuned are computed in the recipe's precision.

        Without its cache of casts, which backward finds empty where checkpointing computes a block again: selective
        checkpointing takes the casts that are then made for other arithmetic than forward's.
        """
        enabled = self.compute != torch.float32
        return torch.autocast(device.type, self.compute, enabled=enabled, cache_enabled=False)

    @property
    def inits_from_images(self) -> bool:
        """Whether trained tensors are initialized from training images (``init_from_images``)."""
        return False

    def init_from_images(self, batches_B3SS: Iterable[Tensor], seed: int) -> None:
        """Initialize the trained tensors from what the backbone computes for images."""
        raise NotImplementedError

    def adapter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that an adapter file holds: what is trained, and what was chosen and goes with it."""
        yield from self.trainable()

    def merged(self) -> dict[str, Tensor]:
        """What a plain timm model needs in place of the backbone's tensors to give the same, under timm's names.

        Raises UserError where no plain timm model gives the same.
        """
        raise UserError(
            f"a {type(self).__name__} computes what no plain timm model does: only linear, full, partial, bias, cls, "
            "lora and ssf can be merged"
        )

    def classify(self, features_BF: Tensor) -> Tensor:
        """The head in its own float32 whatever the backbone's dtype: it is tiny, and its loss is what is minimised."""
        return self.head(features_BF.to(next(self.head.parameters()).dtype))


class Reader(Method):
    """A method that never changes the image's tokens: the backbone runs without autograd."""

    @property
    def reads(self) -> StreamSpec:
        """What is read of the frozen stream besides the pooled features."""
        return StreamSpec()

    @property
    def shares(self) -> StreamSpec:
        """What is rather kept of the stream where it is computed once and many readers share it: larger, and further on
        the way."""
        return self.reads

    def read(self, observed: StreamOutput) -> Tensor:
        """Logits [B, K] from what the stream holds of B images."""
        raise NotImplementedError

    @classmethod
    def read_many(
        cls, readers: Sequence["Reader"], observed: StreamOutput, seeds: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Logits [B, K] of T readers from one reading of the stream, each as it would compute them alone.

        ``seeds`` are those of the readers' random draws (dropout).
        """
        logits = []
        for t, reader in enumerate(readers):
            if seeds is not None:
                torch.manual_seed(seeds[t])
            logits.append(reader.read(observed))
        return logits

    def forward(self, images: Tensor | StreamOutput) -> Tensor:
        if not isinstance(images, StreamOutput):
            images = compute_stream(self.backbone, images, self.reads)
        return self.read(images)


def classification_head(features: int, classes: int) -> nn.Linear:
    """The head of VPT's published set-up: kaiming-normal (fan-out) weight; bias -log(99), a prior of 0.01 a class."""
    head = nn.Linear(features, classes)
    nn.init.kaiming_normal_(head.weight, mode="fan_out")
    nn.init.constant_(head.bias, -math.log(99.0))
    return head

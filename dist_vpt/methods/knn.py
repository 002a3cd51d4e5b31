"""k nearest neighbours among the training images' features. A reader, fitted: nothing is trained.

B images of a batch, n training images, F features, K classes, T readers that share the training images.

As in the protocol of DINO (arXiv 2104.14294, appendix A; Wu et al., arXiv 1805.01978): the k training images with the
largest cosine similarity vote for their labels, with the weight exp(similarity / temperature); or with equal weights.
There features are as they are (``method.head`` published); standardized ones have no direction that all share.
Adapters are the features of all training images, 4 n F bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.errors import UserError
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader
from dist_vpt.methods.config_readers import KNNConfig
from dist_vpt.methods.fitted import FittedReader, Observed, scores
from dist_vpt.methods.stack import ReaderStack, Sources

UNSEEN = 1e-6  # share of the votes that a class without any has: a loss is finite
CHUNK = 2**26  # similarities at once: 256 MiB


class KNN(FittedReader):
    """Logits are the logarithms of the classes' shares of the votes."""

    on_swin = True
    joins = True
    saved_buffers = ("bank", "labels", "votes", "feature_norm.")

    bank: Tensor
    labels: Tensor
    votes: Tensor

    def __init__(self, recipe: KNNConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.head = nn.Identity()
        self.k, self.temperature, self.classes = recipe.k, recipe.temperature, classes
        self.register_buffer("bank", torch.empty(0, backbone.width))  # [n, F] of length 1
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))  # [n]
        self.register_buffer("votes", torch.empty(0))  # [n]: the weight of an image's class

    def size_like(self, tensors: Mapping[str, Tensor]) -> None:
        if {"bank", "labels", "votes"} <= tensors.keys():
            images = len(tensors["labels"])
            self.bank = self.bank.new_empty(images, self.bank.shape[1])
            self.labels, self.votes = self.labels.new_empty(images), self.votes.new_empty(images)

    def features(self, images: Any) -> Tensor:
        return self.directions(self.stream(images).pooled)

    def read(self, stream: StreamOutput) -> Tensor:
        return self.logits(*self.neighbours(self.directions(stream.pooled), self.k))

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        return [torch.stack(cls._read_together(cast(Sequence[KNN], stack.readers), stream)) for stack in stacks]

    @classmethod
    def _read_together(cls, readers: Sequence["KNN"], stream: StreamOutput) -> list[Tensor]:
        """Logits of each; those that were fitted together look once for the neighbours."""
        first = readers[0]
        if not all(reader.bank is first.bank for reader in readers):
            return [reader.read(stream) for reader in readers]
        similar, at = first.neighbours(first.directions(stream.pooled), max(reader.k for reader in readers))
        return [reader.logits(similar[:, : reader.k], at[:, : reader.k]) for reader in readers]

    def directions(self, features_BF: Tensor) -> Tensor:
        """Features of length 1, [B, F]."""
        return F.normalize(self.standardized(features_BF.float()), dim=1)

    def neighbours(self, directions_BF: Tensor, k: int, *, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Similarities and rows of the k nearest training images, the nearest first, both [B, k].

        ``without``: a row for each image that is left out, [B].
        """
        similar_Bn = directions_BF @ self.bank.mT
        if without is not None:
            similar_Bn.scatter_(1, without[:, None], -torch.inf)
        similar_Bk, at_Bk = similar_Bn.topk(k, dim=1)
        return similar_Bk, at_Bk

    def logits(self, similar_Bk: Tensor, at_Bk: Tensor) -> Tensor:
        """[B, K] from the similarities and rows of the neighbours."""
        if self.temperature is None:
            weights_Bk = torch.full_like(similar_Bk, 1 / similar_Bk.shape[1])
        else:
            weights_Bk = (similar_Bk / self.temperature).softmax(1)  # exp, over their sum: large ones stay finite
        shares_BK = similar_Bk.new_zeros(similar_Bk.shape[0], self.classes)
        shares_BK.scatter_add_(1, self.labels[at_Bk], weights_Bk * self.votes[at_Bk])
        return (shares_BK / shares_BK.sum(1, keepdim=True).clamp_min(UNSEEN)).clamp_min(UNSEEN).log()

    @classmethod
    def check_fit(cls, readers: Sequence[FittedReader], labels_n: Tensor) -> None:
        super().check_fit(readers, labels_n)
        most = max(cast(KNN, reader).k for reader in readers)
        if most > len(labels_n):
            raise UserError(
                f"method.k = {most}: there are {len(labels_n)} images to train on, and at most all of them vote; lower "
                "method.k, in a sweep the values of sweep.grid.method.k"
            )

    @classmethod
    @torch.no_grad()
    def fit(
        cls, readers: Sequence[Reader], observed: Observed, raise_on_stop: Callable[[], None] = lambda: None
    ) -> tuple[list[dict[str, float]], list[str]]:
        """The scores are those of each image by its neighbours among the others (leave one out)."""
        own = [cast(KNN, reader) for reader in readers]
        cls.check_fit(own, observed.labels_n)
        cls._measure(own, observed.features_nF)
        bank_nF = own[0].directions(observed.features_nF)
        for reader in own:
            reader.bank, reader.labels, reader.votes = bank_nF, observed.labels_n, observed.weights_n
        images, most = len(bank_nF), max(reader.k for reader in own)
        logits: list[list[Tensor]] = [[] for _ in own]
        for rows in torch.arange(images, device=bank_nF.device).split(max(1, CHUNK // images)):
            raise_on_stop()
            similar, at = own[0].neighbours(bank_nF[rows], min(most, images - 1), without=rows)
            for reader, kept in zip(own, logits, strict=True):
                kept.append(reader.logits(similar[:, : reader.k], at[:, : reader.k]))
        found = [scores(torch.cat(kept), observed) for kept in logits]
        best = max(score["top1"] for score in found)
        return found, [f"each training image by its neighbours among the others: top1 at most {best:.2f} %"]

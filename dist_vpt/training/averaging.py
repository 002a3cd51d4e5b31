"""The moving average of the trained tensors (timm's ModelEmaV3), which is scored and saved in their place."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dist_vpt.distributed.zero import gathered, held, held_part, release_gathered
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import TrainConfig


class WeightAverage:
    """The average of what is trained alone: frozen weights are their own average. Training goes on with its weights.

    Under ZeRO-3 each process averages its shards: an average is taken number by number, so that it needs no others.
    """

    def __init__(self, method: Method, decay: float, *, warmup: bool):
        """``method``: as it is trained, after DeepSpeed has sharded it."""
        self._trained = dict(method.trainable())
        self._ema = ModelEmaV3(self._held(), decay=decay, use_warmup=warmup)

    @classmethod
    def of(cls, train: TrainConfig, method: Method) -> "WeightAverage | None":
        """That of a recipe, if it wants one."""
        if train.model_ema_decay is None:
            return None
        return cls(method, train.model_ema_decay, warmup=train.model_ema_warmup)

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0: the first ones as they are, as in timm's training."""
        self._ema.update(self._held(), step=step + 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What this process holds of the average, by the names of the trained tensors."""
        return dict(zip(self._trained, (average.detach() for average in self._ema.module), strict=True))

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Name and average of each trained tensor, unsharded. A collective call under ZeRO-3."""
        with self.in_place():
            for name, parameter in self._trained.items():
                with gathered([parameter]):
                    yield name, parameter.detach().clone()

    def load(self, tensors: Mapping[str, Tensor], rank: int) -> None:
        """Continue, as process ``rank``, with a saved average, which is unsharded."""
        for name, average in self.tensors.items():
            average.copy_(held_part(self._trained[name], tensors[name], rank))

    @torch.no_grad()
    def replace_trained(self) -> None:
        """Put the average into the method for good."""
        release_gathered(self._trained.values())
        for name, average in self.tensors.items():
            held(self._trained[name]).copy_(average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this the method has the average, and afterwards, to the last bit, its own weights again."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        release_gathered(self._trained.values())
        for name, average in self.tensors.items():
            weights = held(self._trained[name]).clone()
            held(self._trained[name]).copy_(average)
            average.copy_(weights)

    def _held(self) -> nn.ParameterList:
        # Made anew for each step: DeepSpeed may give a parameter another shard.
        return nn.ParameterList([held(parameter) for parameter in self._trained.values()])


def in_place(average: WeightAverage | None) -> AbstractContextManager[None]:
    """Within this the method has the weights that are scored and saved: the average, where there is one."""
    return nullcontext() if average is None else average.in_place()

"""The moving average of the trained tensors (timm's ModelEmaV3), which is scored and saved in their place."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import TrainConfig


class WeightAverage:
    """The average of what is trained alone: frozen weights are their own average. Training goes on with its weights."""

    def __init__(self, method: Method, decay: float, *, warmup: bool):
        self._names = [name for name, _ in method.trainable()]
        self._trained = nn.ParameterList([parameter for _, parameter in method.trainable()])
        self._ema = ModelEmaV3(self._trained, decay=decay, use_warmup=warmup)

    @classmethod
    def of(cls, train: TrainConfig, method: Method) -> "WeightAverage | None":
        """That of a recipe, if it wants one."""
        if train.model_ema_decay is None:
            return None
        return cls(method, train.model_ema_decay, warmup=train.model_ema_warmup)

    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0: the first ones as they are, as in timm's training."""
        self._ema.update(self._trained, step=step + 1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The average, by the names of the trained tensors."""
        return dict(zip(self._names, (average.detach() for average in self._ema.module), strict=True))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with a saved average."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @torch.no_grad()
    def replace_trained(self) -> None:
        """Put the average into the method for good."""
        for parameter, average in zip(self._trained, self._ema.module, strict=True):
            parameter.copy_(average)

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
        for parameter, average in zip(self._trained, self._ema.module, strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)


def in_place(average: WeightAverage | None) -> AbstractContextManager[None]:
    """Within this the method has the weights that are scored and saved: the average, where there is one."""
    return nullcontext() if average is None else average.in_place()

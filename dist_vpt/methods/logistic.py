"""Multinomial logistic regression: the linear head that is the optimum of a penalized loss. A reader, fitted.

n images, F features, K classes.

Of features x and weights W [K, F], the objective is sum of cross entropies(W x + b) + |W|^2 / (2 C), as scikit-learn's
LogisticRegression has it; b has no penalty. x is what the head reads: with ``method.head`` standardized, features minus
their mean over their deviation in all training images (times a number that gives them a length of 20, head.py); with
published, features as they are (CLIP, arXiv 2103.00020, section A.3). A run folder is that of a linear head.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dist_vpt.backbones.vit import Backbone
from dist_vpt.frozen_stream.observe import StreamOutput
from dist_vpt.methods.base import Reader, classify_stack
from dist_vpt.methods.config_readers import LogisticConfig
from dist_vpt.methods.fitted import FittedReader, Observed, scores
from dist_vpt.methods.softmax_regression import MAX_ITERATIONS, solve_path
from dist_vpt.methods.stack import ReaderStack, Sources


class Logistic(FittedReader):
    """K x (F + 1) numbers that are solved for; it reads only the backbone's pooled features."""

    on_swin = True
    joins = True

    def __init__(self, recipe: LogisticConfig, backbone: Backbone, classes: int, compute: torch.dtype):
        super().__init__(backbone, classes, compute, head=recipe.head)
        self.c = recipe.c

    def read(self, stream: StreamOutput) -> Tensor:
        return self.classify(stream.pooled)

    @classmethod
    def read_stacks(
        cls, stacks: Sequence[ReaderStack], stream: StreamOutput, sources: Sequence[Sources]
    ) -> list[Tensor]:
        return [classify_stack(stack, stream.pooled.expand(len(stack.readers), -1, -1)) for stack in stacks]

    @classmethod
    @torch.no_grad()
    def fit(
        cls, readers: Sequence[Reader], observed: Observed, raise_on_stop: Callable[[], None] = lambda: None
    ) -> tuple[list[dict[str, float]], list[str]]:
        own = [cast(Logistic, reader) for reader in readers]
        heads = [cast(nn.Linear, reader.head) for reader in own]
        cls.check_fit(own, observed.labels_n)
        cls._measure(own, observed.features_nF)
        device = observed.features_nF.device
        # MPS has no float64.
        where = torch.device("cpu") if device.type == "mps" else device
        inputs_nF = own[0].standardized(observed.features_nF.float())
        solution = solve_path(
            inputs_nF.to(where),
            observed.labels_n.to(where),
            heads[0].out_features,
            [reader.c for reader in own],
            observed.weights_n.to(where),
            observed.smoothing,
            raise_on_stop,
        )
        found = []
        for head, weight_KF, bias_K in zip(heads, solution.weight_TKF, solution.bias_TK, strict=True):
            head.weight.copy_(weight_KF)
            head.bias.copy_(bias_K)
            found.append(scores(head(inputs_nF), observed))
        lines = [f"solved by L-BFGS: {sum(solution.iterations):,} iterations over {len(own)} values of C"]
        if late := solution.unfinished:
            values = ", ".join(f"{own[t].c:g}" for t in late)
            lines.append(f"note: {MAX_ITERATIONS} iterations were not enough for C = {values}: close to its optimum")
        return found, lines

    def merged(self) -> dict[str, Tensor]:
        return {}

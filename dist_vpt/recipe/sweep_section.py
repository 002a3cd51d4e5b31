"""The sweep section of a recipe."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from dist_vpt.recipe.fields import Section

SET_BY_SWEEP = (
    *("grid.seed", "grid.sweep", "grid.run", "grid.train.test"),
    *("grid.data.train_on", "grid.data.tries", "grid.data.try_index"),
)
MIN_RUNG_EPOCHS = 5  # of a sweep by halving, unless sweep.min_epochs says otherwise: fewer show little of a setting


class RungSize(NamedTuple):
    """How many trials a rung of a sweep has at most, and for how many epochs it trains them."""

    trials: int
    epochs: int


class SweepConfig(Section):
    """The grid and the seeds of `dist-vpt sweep`; `train` ignores them."""

    grid: dict[str, Any] = Field(
        {"optim": {"lr": [1.0, 0.5, 0.25, 0.1, 0.05], "weight_decay": [1e-2, 1e-3, 1e-4, 0.0]}},
        description="recipe keys, each with a list of values. Every combination is a trial, trained on train; the one "
        "with the best val accuracy after its last epoch is chosen (default: VQT's published grid)",
    )
    search: Literal["grid", "halving"] = Field(
        "grid",
        description="grid (the published protocol): train every trial for train.epochs; halving: successive halving, "
        "train all trials for a few epochs, the best 1/reduction_factor of them anew for longer, and so on (rungs), "
        "and choose among those of the last rung, which has train.epochs",
    )
    reduction_factor: int = Field(
        4,
        ge=2,
        description="halving: one in so many trials is promoted to the next rung, which is so many times longer",
    )
    min_epochs: int | None = Field(
        None,
        ge=1,
        description="halving: epochs of the first rung; null: train.epochs divided by reduction_factor as often as the "
        "number of trials can be, and at least 5",
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (42, 44, 82, 100, 800),
        min_length=1,
        description="train the chosen setting on trainval with each of these seeds, and test it",
    )
    parallelize: Literal["trials", "batch"] = Field(
        "trials",
        description="how several processes share the work: each trains trials of its own, or all share every batch",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        def check(values: Any, at: str) -> Iterator[str]:
            if isinstance(values, dict) and values:
                for key, inner in values.items():
                    yield from check(inner, f"{at}.{key}")
            elif not isinstance(values, list) or not values:
                yield f"{at} = {values!r}: must be a list with at least one value"
            elif any(isinstance(value, (list, dict)) for value in values) or len(set(values)) < len(values):
                yield f"{at} = {values!r}: must be plain values, each given once"
            if at in SET_BY_SWEEP:
                yield f"{at}: is set by the sweep; leave it out"

        mistakes = list(check(self.grid, "grid"))
        if len(set(self.seeds)) < len(self.seeds):
            mistakes.append(f"seeds = {list(self.seeds)}: must differ; give each once")
        if self.search == "halving" and "train.epochs" in dict(grid_axes(self.grid)):
            mistakes.append("grid.train.epochs: is set by search = halving; leave it out, or use search=grid")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def trials(self) -> int:
        """Settings of the grid."""
        return math.prod(len(values) for _, values in grid_axes(self.grid))

    def rungs(self, epochs: int) -> list[RungSize]:
        """The rungs of a sweep whose recipe has train.epochs = ``epochs``, the last of which trains for all of them.

        A grid is one rung, and so is halving with fewer trials than reduction_factor or too few epochs.
        """
        sizes, factor, trials = [], self.reduction_factor, self.trials
        if self.search == "halving":
            promotions = 0
            while factor ** (promotions + 1) <= trials:
                promotions += 1
            shortest = self.min_epochs or max(MIN_RUNG_EPOCHS, math.ceil(epochs / factor**promotions))
            for _ in range(promotions):
                if shortest * factor >= epochs * (factor - 1):  # no cheaper than all its trials in the last rung
                    break
                sizes.append(RungSize(trials, shortest))
                trials, shortest = math.ceil(trials / factor), shortest * factor
        return [*sizes, RungSize(trials, epochs)]


def grid_axes(grid: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The keys of a grid, as ``a.b``, each with its values."""
    for key, value in grid.items():
        path = f"{at}.{key}" if at else key
        if isinstance(value, dict):
            yield from grid_axes(value, path)
        else:
            yield path, value

"""The sweep section of a recipe."""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from dist_vpt.recipe.fields import Section
from dist_vpt.recipe.search_space import range_mistake, space_axes

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
    search: Literal["grid", "halving", "optuna"] = Field(
        "grid",
        description="grid (the published protocol): train every trial for train.epochs; halving: successive halving, "
        "train all trials for a few epochs, the best 1/reduction_factor of them anew for longer, and so on (rungs), "
        "and choose among those of the last rung, which has train.epochs; optuna (writers): n_trials settings, each "
        "drawn from `space` in view of those before (TPE, Bergstra et al. 2011, arXiv 1907.10902)",
    )
    reduction_factor: int = Field(
        4,
        ge=2,
        description="halving and pruner = asha: one in so many trials is promoted to the next rung, which is so many "
        "times longer",
    )
    min_epochs: int | None = Field(
        None,
        ge=1,
        description="halving: epochs of the first rung; null: train.epochs divided by reduction_factor as often as the "
        "number of trials can be, and at least 5; pruner = asha: epochs before a trial may be pruned; null: 5",
    )
    space: dict[str, Any] | None = Field(
        None,
        description="optuna: recipe keys, each with a range {low, high, log} (whole numbers where both ends are; log: "
        "drawn on a logarithmic scale) or a list of values; null: what the values of `grid` span",
    )
    n_trials: int = Field(20, ge=1, description="optuna: settings that are tried")
    pruner: Literal["none", "asha"] = Field(
        "asha",
        description="optuna: asha: end a trial early where its val accuracy is not among the best 1/reduction_factor "
        "at min_epochs, at reduction_factor times as many, and so on (asynchronous successive halving, "
        "arXiv 1810.05934); none: train all to the end",
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
        mistakes += self._mistakes_of_space()
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _mistakes_of_space(self) -> Iterator[str]:
        if self.space is not None and not self.space:
            yield "space = {}: has no keys; give ranges, or null for what grid spans"
        for key, value in space_axes(self.space or {}):
            if f"grid.{key}" in SET_BY_SWEEP or key == "train.epochs":
                yield f"space.{key}: is set by the sweep; leave it out"
            elif mistake := range_mistake(value):
                yield f"space.{key} = {value!r}: {mistake}"

    @property
    def trials(self) -> int:
        """Settings of the grid, or of the search."""
        if self.search == "optuna":
            return self.n_trials
        return math.prod(len(values) for _, values in grid_axes(self.grid))

    def rungs(self, epochs: int) -> list[RungSize]:
        """The rungs of a sweep whose recipe has train.epochs = ``epochs``, the last of which trains for all of them.

        A grid is one rung, and so is halving with fewer trials than reduction_factor or too few epochs.
        """
        sizes: list[RungSize] = []
        factor, trials = self.reduction_factor, self.trials
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

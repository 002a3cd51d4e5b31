"""Recipes as flat keys, the differences of two, and the keys that may change when a run is resumed."""

from collections.abc import Iterator
from typing import Any

from dist_vpt.recipe.schema import Recipe


def flatten(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The keys of a recipe as ``a.b``, with their values."""

    def below(value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(value, dict):
            yield at, value
            return
        for key, inner in value.items():
            yield from below(inner, f"{at}.{key}" if at else key)

    return below(recipe.model_dump(mode="json"), "")


def differences(old: Recipe, new: Recipe) -> list[str]:
    """``key: old -> new`` for every key of two recipes that differs."""
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


RESUMABLE_KEYS = (
    "run.",
    "data.root",  # a dataset may be moved
    "data.table.images",
    "data.workers",
    "data.cache",
    "data.streaming_disk_gib",
    "data.extra_tests",  # scored after all others
    "data.on_decode_error",  # an image that stopped the run may be skipped from there on
    "stream.",
    "train.eval_batch_size",
    "runtime.activation_checkpointing",  # trades memory for time
    "runtime.offload",
    "runtime.memory_check",
)  # none of them changes the numbers of a run


def identity_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys that determine a run's numbers, with their values: all but RESUMABLE_KEYS."""
    return {key: value for key, value in flatten(recipe) if not key.startswith(RESUMABLE_KEYS)}

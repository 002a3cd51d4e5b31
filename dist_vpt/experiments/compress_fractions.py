"""The fractions of a compression: their recipes and folders, what is done already, what is finetuned together."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vpt.errors import RunFolderError, UserError
from dist_vpt.files import read_json
from dist_vpt.methods.config_readers import VQTConfig
from dist_vpt.recipe.differences import RESUMABLE_KEYS, differences, identity_keys
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder


@dataclass(frozen=True)
class Fraction:
    """One share of a run's features: its recipe, its run folder, and what else it depends on."""

    keep: float
    features: int  # that are kept
    recipe: Recipe
    folder: RunFolder
    made_of: dict[str, Any]  # mode, lasso and the source's hash


FractionOf = Callable[[float], Fraction]


def parse_shares(values: Sequence[str | float]) -> list[float]:
    """Shares of the features, the largest first, each once. Raises UserError for other values."""
    shares, wrong = set(), []
    for value in values:
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if 0 < share <= 1:
            shares.add(share)
        else:
            wrong.append(str(value))
    if wrong or not shares:
        raise UserError(
            f"--keep {' '.join(wrong)}: must be shares of the features, above 0 and at most 1, such as --keep 0.7 0.5"
        )
    return sorted(shares, reverse=True)


def make_fraction(recipe: Recipe, features: int, out: Path, made_of: dict[str, Any], keep: float) -> Fraction:
    """The fraction of a run with this recipe and so many features, in its folder below ``out``."""
    assert isinstance(recipe.method, VQTConfig)
    kept, path = max(1, round(keep * features)), out / f"{made_of['mode']}-{keep}"
    method = recipe.method.model_copy(update={"keep": kept})
    run = recipe.run.model_copy(update={"dir": str(path), "resume": "auto"})
    return Fraction(keep, kept, recipe.model_copy(update={"method": method, "run": run}), RunFolder(path), made_of)


def is_done(fraction: Fraction) -> bool:
    """Whether a fraction has its result. Raises RunFolderError where its folder holds something else."""
    folder = fraction.folder
    if folder.status().get("status") != "done":
        return False
    absent = [path.name for path in (folder.result, folder.adapters) if not path.is_file()]
    if absent:
        raise RunFolderError(f"{folder.path}: is done, but {' and '.join(absent)} is missing; remove this folder")
    changed = changes(fraction)
    if changed:
        raise RunFolderError(
            f"{folder.path}: holds another compression; choose another --out, remove this folder, or undo:\n"
            + "\n".join(f"  {change}" for change in changed)
        )
    return True


def changes(fraction: Fraction) -> list[str]:
    """Differences between a fraction and the run that is in its folder."""
    found, made_of = read_json(fraction.folder.result).get("compression", {}), fraction.made_of
    changed = [f"{key}: {found.get(key)} -> {value}" for key, value in made_of.items() if found.get(key) != value]
    lines = differences(fraction.folder.load(), fraction.recipe)
    return changed + [line for line in lines if not line.startswith(RESUMABLE_KEYS)]


def finetune_group(pending: Sequence[Fraction], fraction_of: FractionOf) -> tuple[Sequence[Fraction], Path]:
    """The fractions that `finetune` trains together, and the file of their state while it does.

    A group that was interrupted before all of its fractions were written is resumed as a whole.
    """
    for shares, file in _states(pending[0]):
        if shares.issuperset(fraction.keep for fraction in pending):
            return [fraction_of(share) for share in sorted(shares, reverse=True)], file
    name = "_".join([_state_name(pending[0]), *(str(fraction.keep) for fraction in pending)])
    return pending, pending[0].folder.path.parent / f"{name}.pt"


def remove_finished_states(fraction: Fraction, fraction_of: FractionOf) -> None:
    """Remove the states of groups whose fractions are all done, and what killed writes left of them."""
    for shares, file in _states(fraction):
        if all(is_done(fraction_of(share)) for share in shares):
            for left in (file, *file.parent.glob(f".{file.name}.*.tmp")):
                left.unlink(missing_ok=True)


def _states(fraction: Fraction) -> list[tuple[set[float], Path]]:
    """States of groups that differ from this fraction in their shares alone: the shares and the file of each."""
    files = fraction.folder.path.parent.glob(f"{_state_name(fraction)}_*.pt")
    return [({float(share) for share in file.stem.split("_")[1:]}, file) for file in files]


def _state_name(fraction: Fraction) -> str:
    keys = {key: value for key, value in identity_keys(fraction.recipe).items() if key != "method.keep"}
    return f".finetune-{hashlib.sha256(json.dumps([fraction.made_of, keys]).encode()).hexdigest()[:16]}"

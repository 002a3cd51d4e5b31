"""``dist-vpt rank-backbones``: which of several backbones a task needs, from one run on all of them.

As in ComBo (arXiv 2512.01405): combo is trained on all K with a group penalty, and the norm of each backbone's part of
the projection, P_k, ranks them. The best are then trained again, without the penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.experiments.early_checks import check_ranking
from dist_vpt.experiments.run import run
from dist_vpt.files import to_json, write_atomically
from dist_vpt.methods.combo import Combo
from dist_vpt.planning.footprint import weightless
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import read_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.inputs import resolve_inputs


@dataclass(frozen=True)
class Ranked:
    """A backbone's place."""

    number: int  # in the recipe's list, from 0
    name: str
    image_size: int  # pixels
    norm: float  # |P_k|
    share: float  # of the sum of all norms


def rank_backbones(recipe: Recipe, best: int) -> list[Ranked]:
    """Train once on all backbones, or take the run that is there, print and return their ranking.

    ``ranking.json`` in the run folder holds it. Raises what ``run`` raises.
    """
    check_ranking(recipe, best)
    result = run(recipe)
    folder = RunFolder(str(recipe.run.dir))
    ranking = _ranking(folder.load(), folder)
    if LaunchEnv.current().rank:
        return ranking
    chosen = sorted(each.number for each in ranking[:best])
    content = {
        "group_penalty": recipe.method.model_dump()["group_penalty"],
        "ranking": [vars(each) for each in ranking],
        "best": [recipe.members[number].name for number in chosen],
        f"val_{recipe.data.metric}": (result["last"].get("val") or {}).get(recipe.data.metric),
    }
    write_atomically(folder.path / "ranking.json", to_json(content, indent=1) + "\n")
    _show(recipe, ranking, chosen, folder)
    return ranking


def _ranking(recipe: Recipe, folder: RunFolder) -> list[Ranked]:
    tensors, facts = read_adapters(folder.adapters)
    inputs = resolve_inputs(recipe)
    method = weightless(recipe, inputs, len(facts["classes"]))
    assert isinstance(method, Combo)
    norms: list[float] = method.group_norms(tensors["projection.weight"]).tolist()
    total = sum(norms) or 1.0
    found = [
        Ranked(number, member.name, transform.image_size, norm, norm / total)
        for number, (member, transform, norm) in enumerate(zip(recipe.members, inputs.transforms, norms, strict=True))
    ]
    return sorted(found, key=lambda each: -each.norm)


def _show(recipe: Recipe, ranking: list[Ranked], chosen: list[int], folder: RunFolder) -> None:
    console = Console(highlight=False)
    table = Table(title="backbones by the norm of their part of the projection")
    for column in ("rank", "backbone", "pixels", "norm", "share, %"):
        table.add_column(column, justify="left" if column == "backbone" else "right", overflow="fold")
    for rank, each in enumerate(ranking, 1):
        table.add_row(str(rank), each.name, str(each.image_size), f"{each.norm:.3f}", f"{100 * each.share:.1f}")
    console.print(table)
    console.print(f"the best {len(chosen)}, to be trained without the penalty:", markup=False)
    console.print(_key_of(recipe, chosen), markup=False, soft_wrap=True)
    console.print(str(folder.path / "ranking.json"), markup=False, soft_wrap=True)


def _key_of(recipe: Recipe, chosen: Sequence[int]) -> str:
    """The chosen backbones as a recipe's lines, to be pasted into a file."""
    members: list[dict[str, Any]] = [
        recipe.members[number].model_dump(mode="json", exclude_defaults=True) | {"name": recipe.members[number].name}
        for number in chosen
    ]
    key: dict[str, Any] = {"backbones": members}
    if len(members) == 1:
        size = members[0].pop("image_size", None)
        key = {"backbone": members[0], **({"data": {"image_size": size}} if size else {})}
    return yaml.safe_dump(key, sort_keys=False).strip()

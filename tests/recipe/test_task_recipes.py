"""The recipes of VTAB-1k and FGVC: one for each row that sets only the task, and every pair with a method loads."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dist_vpt.data.tasks import TASKS
from dist_vpt.recipe.loading import load_recipe
from tests.running import ROOT

METHODS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
RECIPES = sorted([*(ROOT / "configs" / "vtab").glob("*.yaml"), *(ROOT / "configs" / "fgvc").glob("*.yaml")])
PUBLISHED = json.loads((ROOT / "dist_vpt" / "report" / "published.json").read_text())["tables"]


def test_every_row_has_a_recipe() -> None:
    rows = [name for name, row in TASKS.items() if row.group]
    assert sorted(path.stem for path in RECIPES) == sorted(rows)
    assert len(RECIPES) == 19 + 5
    assert all((path.parent.name == "fgvc") == (TASKS[path.stem].group == "fgvc") for path in RECIPES)
    assert len(METHODS) == 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_pair_loads(path: Path) -> None:
    assert yaml.safe_load(path.read_text()) == {"data": {"task": path.stem}}
    row = TASKS[path.stem]
    for method in METHODS:
        either, other = (load_recipe(files, ["data.root=x"]) for files in ((method, path), (path, method)))
        assert either.model_dump(exclude={"run"}) == other.model_dump(exclude={"run"})
        assert either.train.epochs == 100
        assert either.method.fitted or either.optim.warmup_epochs == 10
        if method.stem == "vpt_deep":
            assert either.method.prompts == row.prompts  # type: ignore[union-attr]
        if method.stem == "vqt":
            assert either.method.queries == (row.queries or 1)  # type: ignore[union-attr]
    explicit = load_recipe([METHODS[-1], path], ["data.root=x", "method.queries=3"])
    assert explicit.method.queries == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_may_inherit_both(path: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: [{ROOT}/configs/method/vpt_deep.yaml, {path}]\ndata: {{root: x}}\n")
    assert load_recipe([mine]).method.prompts == TASKS[path.stem].prompts  # type: ignore[union-attr]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_heads_say_what_was_published(path: Path) -> None:
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    of_vpt = [each["rows"] for each in PUBLISHED if "2203.12119" in each["source"]]
    table = next(rows for rows in of_vpt if path.stem in rows["linear"])
    for label, row in (
        ("linear", "linear"),
        ("full", "full"),
        ("VPT-shallow", "vpt_shallow"),
        ("VPT-deep", "vpt_deep"),
    ):
        assert f"{label} {table[row][path.stem]}" in head
    assert re.search(r"dist-vpt sweep .* vpt_deep .*Published test top-1 .*arXiv 2203\.12119.*Cost", head)
    assert f"{dict(TASKS[path.stem].expected_counts)['test']:,}" in head
    assert max(map(len, path.read_text().splitlines())) <= 120

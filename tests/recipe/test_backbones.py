"""The key `backbones`: names of recipes, mappings, files, and the whole again from a resolved recipe."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_vpt.recipe.loading import load_recipe

LINEAR = "method.name=linear"


def test_a_name_stands_for_what_its_recipe_says() -> None:
    recipe = load_recipe([], ["backbones=[dinov2_s14, {base: dinov2_s14, weights: random, image_size: 56}]", LINEAR])
    own = load_recipe(["dinov2_s14"], [LINEAR])
    first, second = recipe.members
    assert first.model_dump(exclude={"image_size"}) == own.backbone.model_dump()
    assert first.image_size == own.data.image_size
    assert (second.name, second.weights, second.image_size) == (own.backbone.name, "random", 56)
    alone = recipe.of_each_backbone
    assert [each.backbone for each in alone] == list(recipe.members)
    assert [each.data.image_size for each in alone] == [own.data.image_size, 56]
    assert all(each.backbones is None for each in alone)


def test_a_mapping_without_a_size_has_the_recipes() -> None:
    recipe = load_recipe([], ["backbones=[demo, {name: test_vit, image_size: 48}]", LINEAR, "data.image_size=16"])
    assert [each.data.image_size for each in recipe.of_each_backbone] == [16, 48]
    assert recipe.backbone_name == "demo + test_vit"


def test_a_file_is_relative_to_the_one_that_lists_it(
    write: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("mine/wide.yaml", "backbone: {name: test_vit, weights: random}\ndata: {image_size: 48}")
    file = write("mine/both.yaml", "backbones: [demo, wide.yaml]\nmethod: {name: linear}")
    for recipe in (load_recipe([str(file)]), load_recipe([], ["backbones=[demo, mine/wide.yaml]", LINEAR])):
        assert (recipe.members[1].name, recipe.members[1].weights) == ("test_vit", "random")
        assert recipe.of_each_backbone[1].data.image_size == 48


def test_the_resolved_recipe_loads_again(write: Callable[[str, str], Path]) -> None:
    given = ["backbones=[demo, {base: dinov2_s14, weights: random}]", "method.name=combo", "method.group_penalty=0.1"]
    recipe = load_recipe([], given)
    assert load_recipe([str(write("resolved.yaml", recipe.to_yaml()))]).model_dump() == recipe.model_dump()

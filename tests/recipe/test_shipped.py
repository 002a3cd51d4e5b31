"""Recipes by name: found from anywhere, merged by kind, listed and copied."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError
from dist_vpt.recipe import shipped
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.shipped import find_recipe, shipped_recipes
from tests.running import ROOT

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*arguments: str) -> Recipe:
    return load_recipe(*split_arguments(arguments))


def settings(recipe: Recipe) -> dict:
    return recipe.model_dump(exclude={"run": {"dir"}})


# Names


def test_every_recipe_has_a_name_and_a_kind() -> None:
    names = [recipe.name for recipe in shipped_recipes()]
    assert len(set(names)) == len(names) == len(list(CONFIGS.rglob("*.yaml")))
    assert {"base", "quickstart", "digits/vqt", "vqt", "dtd", "cub", "sup_b16_in21k", "image_folder"} <= set(names)
    for recipe in shipped_recipes():
        assert find_recipe(recipe.name) == find_recipe(recipe.path) == recipe.file
    kinds = {recipe.name: recipe.kind for recipe in shipped_recipes()}
    assert (kinds["digits/vqt"], kinds["quickstart"], kinds["vqt"]) == ("complete", "complete", "method")
    assert (kinds["dtd"], kinds["cub"], kinds["fgvc"], kinds["base"]) == ("task", "task", "data", "base")


@pytest.mark.parametrize(
    "names", itertools.permutations(["vqt", "sup_b16_in21k", "image_folder", "quickstart"]), ids=" ".join
)
def test_the_order_of_names_does_not_matter(names: tuple[str, ...]) -> None:
    recipe = load(*names, "data.root=x")
    assert recipe.run.dir == "runs/quickstart-sup_b16_in21k-image_folder-vqt"
    assert (recipe.method.name, recipe.backbone.name, recipe.data.task) == ("vqt", "sup_b16_in21k", "image_folder")
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.optim.lr) == (64, 50, 1e-3)
    # VQT's published batch size and epochs win over those of the data, and its rate over the quick start's.
    recipe = load(*names, "data.root=x", "protocol=published")
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.optim.lr) == (128, 100, 0.25)
    assert recipe.runtime.precision == "auto"


def test_published_counts_are_taken_with_names() -> None:
    for names in itertools.permutations(["vpt_deep", "svhn", "sup_b16_in21k"]):
        assert load(*names, "data.root=x").method.prompts == 50  # type: ignore[union-attr]
    assert load("vpt_deep", "svhn", "data.root=x", "method.prompts=3").method.prompts == 3  # type: ignore[union-attr]


def test_a_path_to_a_shipped_recipe_is_the_same_as_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    named = load("vqt", "dinov2_s14", "dtd", "data.root=x")
    files = [f"configs/{path}.yaml" for path in ("method/vqt", "backbone/dinov2_s14", "vtab/dtd")]
    monkeypatch.chdir(ROOT)
    assert load(*files, "data.root=x") == named
    monkeypatch.chdir("/")
    assert load(*(str(ROOT / file) for file in files), "data.root=x") == named


def test_files_of_the_user_come_last_in_the_order_given() -> None:
    Path("a.yaml").write_text("train: {epochs: 17}\noptim: {lr: 0.5}")
    Path("b.yaml").write_text("train: {epochs: 18}\nseed: 3")
    recipe = load("a.yaml", "vqt", "b.yaml", "base", "seed=4")
    assert (recipe.train.epochs, recipe.optim.lr, recipe.seed) == (18, 0.5, 4)
    assert load("a.yaml", "vqt", "b.yaml", "protocol=published").train.batch_size == 128
    assert recipe.run.dir == "runs/base-vqt-a-b"
    assert load("b.yaml", "a.yaml", "vqt", "train.test=false").train.epochs == 17


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("vqt", "vpt_deep"), "method"),
        (("vqt", str(ROOT / "configs" / "method" / "linear.yaml")), "method"),
        (("dtd", "svhn"), "task"),
        (("mae_b16", "dinov2_s14"), "backbone"),
        (("hf", "image_folder"), "data"),
    ],
)
def test_two_recipes_of_a_kind_are_refused(names: tuple[str, ...], kind: str) -> None:
    with pytest.raises(RecipeError, match=f": 2 recipes of the kind {kind}, and a run has one; remove the others"):
        split_arguments(names)


def test_a_file_wins_over_a_name_and_a_name_over_a_folder() -> None:
    Path("vqt").mkdir()
    assert load("vqt").method.name == "vqt"
    Path("linear").write_text("method: {name: bias}")
    assert load("linear").method.name == "bias"


def test_bases_by_name_merge_in_the_order_written() -> None:
    Path("mine.yaml").write_text("base: [vqt, digits/common]\nseed: 2")
    recipe = load("mine.yaml")
    assert (recipe.method.name, recipe.train.epochs, recipe.seed) == ("vqt", 40, 2)
    Path("other.yaml").write_text("base: digits/vpt_deep")
    assert settings(load("other.yaml")) == settings(load("digits/vpt_deep"))


def test_an_ambiguous_name_lists_the_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    shutil.copy(CONFIGS / "method" / "vqt.yaml", tmp_path / "configs" / "data" / "vqt.yaml")
    monkeypatch.setattr(shipped, "shipped_folder", lambda name: tmp_path / name)
    shipped_recipes.cache_clear()
    try:
        with pytest.raises(RecipeError) as caught:
            load("vqt")
        assert load("method/vqt").method.name == "vqt"
    finally:
        shipped_recipes.cache_clear()
    assert str(caught.value) == (
        "1 mistake in the recipe:\n  command line: vqt: the name of several recipes; write one of data/vqt, method/vqt"
    )


def test_an_unknown_name_is_one_message_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vpt_dep", "dtd", "data.root=x"]) == 2
    assert capsys.readouterr().err == (
        "error: 1 mistake in the recipe:\n  command line: vpt_dep: neither a file nor the name of a recipe; "
        "did you mean 'vpt_deep' or 'digits/vpt_deep'?\n"
    )
    assert list(Path().iterdir()) == []


# recipe list and recipe copy


def test_recipe_list_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["name", "kind", "what"]
    assert [row.split()[:2] for row in rows] == [[recipe.name, recipe.kind] for recipe in shipped_recipes()]
    assert "linear                method    Linear probing: a head on frozen features" in rows
    assert all(len(row.split(maxsplit=2)[2]) > 20 for row in rows)


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.path)
def test_a_copy_loads_from_anywhere_as_the_recipe(recipe: shipped.ShippedRecipe, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    assert main(["recipe", "copy", recipe.name, "deep/mine.yaml"]) == 0
    text = (tmp_path / "deep" / "mine.yaml").read_text()
    assert "../" not in text
    assert "$schema" not in text
    root = ["data.root=x"] if recipe.kind in ("data", "task") else []
    assert settings(load("deep/mine.yaml", *root)) == settings(load(recipe.name, *root))


def test_a_copy_overwrites_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "copy", "digits/vqt"]) == 0
    assert capsys.readouterr().out == "vqt.yaml\n"
    Path("vqt.yaml").write_text("seed: 5")
    assert main(["recipe", "copy", "digits/vqt"]) == 2
    message = "error: vqt.yaml: exists already; name another file: dist-vpt recipe copy digits/vqt FILE\n"
    assert capsys.readouterr().err == message
    assert Path("vqt.yaml").read_text() == "seed: 5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["vpt_dep"],
            "vpt_dep: neither a file nor the name of a recipe; did you mean 'vpt_deep' or 'digits/vpt_deep'?",
        ),
        (["mine.yaml"], "mine.yaml: not a recipe that comes with the package; copy your own files with cp"),
        (
            ["vqt", "no/folder/a.yaml"],
            "no/folder/a.yaml: cannot be written (No such file or directory); name another file",
        ),
    ],
)
def test_copies_that_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("seed: 1")
    assert main(["recipe", "copy", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("demo", "write backbone.name=demo"),
        ("vit_small_patch16_224.augreg_in1k", "write backbone.name=vit_small_patch16_224.augreg_in1k"),
        ("dinov2_b14", "write backbone.name=dinov2_b14, or name 'dinov2_s14' or 'dinov3_b16' or 'dinov3_s16'"),
        ("digits", "write data.task=digits, or name 'digits/vqt' or 'digits/full' or 'digits/linear'"),
        ("vpt", "write method.name=vpt, or name 'vqt' or 'vpt_cls'"),
        ("tfds", "write data.format=tfds"),
        ("BF16", "write runtime.precision=bf16"),
        ("published", "write protocol=published"),
        ("optuna", "write sweep.search=optuna"),
        ("wandb", "write run.trackers=[wandb]"),
        ("int8", "write stream.dtype=int8 or runtime.quantize=int8"),
        ("train.epochs", "write train.epochs=..."),
        ("method.prompts", "write method.prompts=..."),
        ("auto", "`dist-vpt recipe list` shows all names"),  # of too many keys
    ],
)
def test_a_value_in_place_of_a_recipe_gets_its_key(typed: str, hint: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(["linear", typed], [])
    (line,) = str(refused.value).splitlines()[1:]
    assert line.strip() == f"command line: {typed}: neither a file nor the name of a recipe; {hint}"


def test_the_key_of_a_value_is_found_without_timm() -> None:
    code = (
        "import sys; from dist_vpt.recipe.values_as_names import overrides_for; overrides_for('vit_tiny_patch16_224')"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; print({{'timm', 'torch'}} & {{*sys.modules}})"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "set()\n"

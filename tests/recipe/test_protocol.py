"""``protocol``: this package's settings of a method, or the published ones."""

from pathlib import Path

import pytest
import yaml

from dist_vpt.cli.main import main
from dist_vpt.errors import RecipeError
from dist_vpt.experiments.suite_plan import plan_experiments
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Protocol, Recipe
from dist_vpt.recipe.shipped import shipped_recipes
from dist_vpt.runs.folder import RunFolder

pytestmark = pytest.mark.usefixtures("in_a_folder")
METHODS = [recipe.name for recipe in shipped_recipes() if recipe.kind == "method"]


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*arguments: str, protocol: Protocol = "default") -> Recipe:
    return load_recipe(*split_arguments(arguments), protocol=protocol)


def test_published_settings_are_one_word_away() -> None:
    default, published = load("vpt_deep"), load("vpt_deep", "protocol=published")
    assert (default.optim.name, default.optim.scale_lr, default.protocol) == ("adamw", False, "default")
    assert (default.method.head, default.method.init) == ("standardized", "scaled")  # type: ignore[union-attr]
    assert (published.optim.name, published.optim.lr, published.optim.scale_lr) == ("sgd", 5.0, True)
    assert (published.method.head, published.method.init) == ("published", "random")  # type: ignore[union-attr]
    assert published.sweep.grid["optim"]["lr"][0] == 50
    assert published.protocol == "published"
    assert (default.backbone.position_resize, published.backbone.position_resize) == (None, "vpt")
    assert load("linear", "swin_b_in22k", "protocol=published").backbone.position_resize is None


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_both(method: str) -> None:
    default, published = load(method), load(method, "protocol=published")
    if default.method.fitted:  # without an optimizer
        assert (default.method.head, published.method.head) == ("standardized", "published")
        assert default.sweep.grid == published.sweep.grid
        return
    assert (default.optim.name, default.optim.scale_lr, default.method.head) == ("adamw", False, "standardized")
    assert published.method.head == "published"
    assert default.optim.lr in default.sweep.grid["optim"]["lr"]
    if method not in ("combo", "ladder"):  # which have one published setting, and none
        assert published.optim.scale_lr
        assert published.sweep.grid["optim"]["weight_decay"] == [1e-2, 1e-3, 1e-4, 0.0]
    assert default.optim.warmup_epochs == default.train.epochs / 10


def test_a_recipe_may_give_the_protocol_wherever_it_stands() -> None:
    Path("mine.yaml").write_text("base: [vqt]\nprotocol: published\nseed: 3")
    assert load("mine.yaml").optim.lr == 0.25
    assert load("mine.yaml", "protocol=default").optim.lr == 1e-3
    Path("first.yaml").write_text("protocol: published")
    assert load("first.yaml", "vqt").optim.lr == 0.25


def test_later_files_and_overrides_win_over_published_settings() -> None:
    Path("mine.yaml").write_text("optim: {lr: 0.5}\nmethod: {head: standardized}")
    recipe = load("vqt", "mine.yaml", "protocol=published", "optim.weight_decay=0.5")
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.name) == (0.5, 0.5, "adam")
    assert recipe.method.head == "standardized"


def test_a_file_of_the_user_may_have_published_settings() -> None:
    Path("mine.yaml").write_text("seed: 1\npublished:\n  seed: 2\n  optim: {lrr: 1}")
    assert load("mine.yaml").seed == 1
    with pytest.raises(RecipeError, match=r"mine.yaml:4: optim.lrr = 1: unknown key; did you mean 'lr'"):
        load("mine.yaml", "protocol=published")
    Path("mine.yaml").write_text("seed: 1\npublished: 3")
    with pytest.raises(RecipeError, match=r"mine.yaml:2: published = 3: must be a mapping of keys to values"):
        load("mine.yaml")
    with pytest.raises(RecipeError, match="published is a key of recipe files only; leave published out"):
        load("published.seed=3")


@pytest.mark.parametrize("key", ["base", "published", "protocol"])
def test_what_a_section_published_cannot_hold(key: str) -> None:
    Path("mine.yaml").write_text(f"seed: 1\npublished:\n  {key}: vqt")
    with pytest.raises(RecipeError, match=rf"mine.yaml:3: published.{key} = 'vqt': is a key of the file itself"):
        load("mine.yaml")


def test_timms_positions_stay_where_they_are_given() -> None:
    for value in ("timm", "null"):
        recipe = load("linear", "protocol=published", f"backbone.position_resize={value}")
        assert recipe.backbone.positions == "timm"


def test_a_rate_of_sgd_under_adamw_is_noted() -> None:
    Path("mine.yaml").write_text("base: [linear]\noptim: {lr: 1.0}")
    [note] = [line for line in load("mine.yaml", "data.task=digits").warnings if "optim.lr" in line]
    assert note.startswith("optim.lr = 1 is large for optim.name = adamw, the default; rates of published code go with")
    assert load("linear", "data.task=digits").warnings == []
    assert load("mine.yaml", "data.task=digits", "protocol=published", "optim.name=sgd").warnings == []


def test_another_method_keeps_the_protocol() -> None:
    recipe = load("vpt_deep", "protocol=published", "method.name=vqt")
    assert (recipe.method.head, recipe.method.init) == ("published", "random")  # type: ignore[union-attr]


@pytest.mark.parametrize("epochs", [1, 5, 200])
def test_warm_up_is_a_tenth_of_the_epochs_unless_given(epochs: int) -> None:
    assert load("lora", f"train.epochs={epochs}").optim.warmup_epochs == epochs / 10
    assert load("lora", f"train.epochs={epochs}", "optim.warmup_epochs=0.5").optim.warmup_epochs == 0.5
    with pytest.raises(RecipeError, match=r"train.epochs = 'x': must be a valid integer"):
        load("lora", "train.epochs=x")


def test_sweeps_and_suites_are_published_unless_told() -> None:
    assert load("vpt_deep", protocol="published").optim.name == "sgd"
    assert load("vpt_deep", "protocol=default", protocol="published").optim.name == "adamw"
    [one] = plan_experiments(["dtd"], ["vpt_deep"], [], "/data", "runs/x")
    assert (one.recipe.protocol, one.trials) == ("published", 40)
    [other] = plan_experiments(["dtd"], ["vpt_deep"], ["protocol=default"], "/data", "runs/x")
    assert (other.recipe.protocol, other.trials) == ("default", 5)


@pytest.mark.parametrize(("command", "protocol"), [("sweep", "published"), ("train", "default")])
def test_the_command_decides_where_nothing_is_given(
    command: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("dist_vpt.experiments.early_checks.check_early", lambda recipe, *_: seen.append(recipe))
    monkeypatch.setattr("dist_vpt.experiments.sweep.sweep", lambda recipe: {})
    monkeypatch.setattr("dist_vpt.experiments.run.run", lambda recipe: {})
    assert main([command, "digits/linear"]) == 0
    assert [recipe.protocol for recipe in seen] == [protocol]


def test_a_resolved_recipe_is_equal_when_it_is_loaded() -> None:
    for protocol in ("default", "published"):
        recipe = load("vqt", f"protocol={protocol}")
        Path("resolved.yaml").write_text(recipe.to_yaml())
        assert load("resolved.yaml", f"run.dir={recipe.run.dir}") == recipe


def test_run_folders_of_older_versions_keep_their_head(tmp_path: Path) -> None:
    for method in ("linear", "vqt", "vpt_deep"):
        recipe = yaml.safe_load(load(method, "protocol=published").to_yaml())
        del recipe["protocol"], recipe["method"]["head"], recipe["backbone"]["position_resize"]
        if method == "vqt":
            del recipe["method"]["init"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        loaded = RunFolder(tmp_path).load(["seed=7"])
        assert (loaded.protocol, loaded.method.head, loaded.seed) == ("published", "published", 7)
        assert getattr(loaded.method, "init", "random") == "random"
        assert loaded.backbone.positions == "timm"

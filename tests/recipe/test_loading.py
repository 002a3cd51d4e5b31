"""Recipes: merged as written, checked whole, and saved so that they load again."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_vpt.errors import RecipeError
from dist_vpt.methods.config import VPTConfig
from dist_vpt.methods.config_readers import LinearConfig
from dist_vpt.recipe.differences import differences
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe, json_schema

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE_FILES = 70
Write = Callable[[str, str], Path]


def refused(*overrides: str, files: tuple[Path, ...] = ()) -> list[str]:
    """The mistakes for which a recipe is rejected."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(files, overrides)
    first, *mistakes = str(caught.value).split("\n")
    assert first == ("1 mistake in the recipe:" if len(mistakes) == 1 else f"{len(mistakes)} mistakes in the recipe:")
    assert all(mistake.startswith("  ") for mistake in mistakes)
    return [mistake[2:] for mistake in mistakes]


# Merging


def test_no_file_is_the_default_recipe() -> None:
    recipe = load_recipe([])
    assert recipe == Recipe().model_copy(update={"run": recipe.run})
    assert recipe.run.dir == "runs/default"
    assert isinstance(recipe.method, VPTConfig)


def test_bases_win_in_order_and_the_file_over_all(write: Write) -> None:
    write("a.yaml", "seed: 1\ntrain: {epochs: 11, batch_size: 8}\noptim: {lr: 0.1}")
    write("b.yaml", "seed: 2\ntrain: {epochs: 12}")
    recipe = load_recipe([write("c.yaml", "base: [a.yaml, b.yaml]\nseed: 3")])
    assert (recipe.seed, recipe.train.epochs, recipe.train.batch_size, recipe.optim.lr) == (3, 12, 8, 0.1)
    swapped = load_recipe([write("d.yaml", "base: [b.yaml, a.yaml]")])
    assert (swapped.seed, swapped.train.epochs) == (1, 11)


def test_bases_are_relative_to_the_file_that_names_them(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("shared/deepest.yaml", "seed: 5")
    write("shared/base.yaml", "base: deepest.yaml\noptim: {lr: 0.5}")
    file = write("mine/recipe.yaml", "base: ../shared/base.yaml")
    monkeypatch.chdir("/")
    recipe = load_recipe([file])
    assert (recipe.seed, recipe.optim.lr) == (5, 0.5)


def test_base_is_no_override() -> None:
    (mistake,) = refused("base=a.yaml")
    assert (
        mistake
        == "command line: base=a.yaml: base is a key of recipe files only; give a.yaml as an argument of its own"
    )


def test_two_files_may_share_a_base(write: Write) -> None:
    write("base.yaml", "seed: 1")
    write("a.yaml", "base: base.yaml\noptim: {lr: 0.1}")
    write("b.yaml", "base: base.yaml\ntrain: {epochs: 2}")
    recipe = load_recipe([write("c.yaml", "base: [a.yaml, b.yaml]")])
    assert (recipe.seed, recipe.optim.lr, recipe.train.epochs) == (1, 0.1, 2)


@pytest.mark.parametrize(
    "base", ["a.yaml", "../{folder}/a.yaml", "{absolute}"], ids=["itself", "another-spelling", "absolute"]
)
def test_a_file_that_inherits_from_itself(base: str, write: Write, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    write("a.yaml", f"seed: 1\nbase: {base.format(folder=tmp_path.name, absolute=file)}")
    (mistake,) = refused(files=(file,))
    assert mistake.startswith(f"{file}:2: base: ")
    assert "inherits from itself" in mistake


def test_two_files_that_inherit_from_each_other(write: Write) -> None:
    write("b.yaml", "base: a.yaml")
    (mistake,) = refused(files=(write("a.yaml", "base: b.yaml"),))
    assert "b.yaml:1: base: " in mistake
    assert "inherits from itself" in mistake


def test_a_missing_base_names_who_asked_and_the_nearest_file(write: Write, tmp_path: Path) -> None:
    write("common.yaml", "")
    file = write("a.yaml", "seed: 1\n\nbase: comon.yaml")
    assert refused(files=(file,)) == [
        f"{file}:3: {tmp_path}/comon.yaml: no such recipe file; did you mean '{tmp_path}/common.yaml'?"
    ]


@pytest.mark.parametrize("base", ["3", "{a: b}", "[a.yaml, 3]"])
def test_a_base_that_is_no_file_name(base: str, write: Write) -> None:
    write("a.yaml", "")
    file = write("b.yaml", f"base: {base}")
    (mistake,) = refused(files=(file,))
    assert mistake.startswith(f"{file}:1: base = ")
    assert "must be a recipe file or a list of them" in mistake


def test_files_of_one_command_line_merge_in_order_and_name_the_run(write: Write) -> None:
    first = write("first.yaml", "seed: 1\noptim: {lr: 0.1, momentum: 0.5}")
    second = write("second.yaml", "optim: {lr: 0.2}")
    recipe = load_recipe([first, second])
    assert (recipe.seed, recipe.optim.lr, recipe.optim.momentum) == (1, 0.2, 0.5)
    assert recipe.run.dir == "runs/first-second"


def test_overrides_win_over_files(write: Write) -> None:
    file = write("a.yaml", "seed: 1\noptim: {lr: 0.1}")
    recipe = load_recipe([file], ["optim.lr=0.3", "seed=4", "seed=5"])
    assert (recipe.seed, recipe.optim.lr) == (5, 0.3)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=1e-3", 0.001),
        ("optim.lr=2E5", 2e5),
        ("optim.lr=.5e+1", 5.0),
        ("optim.lr=3", 3.0),
        ("optim.betas=[0.8, 0.99]", (0.8, 0.99)),
        ("optim.clip_norm=1.5", 1.5),
        ("optim.clip_norm=null", None),
        ("train.test=false", False),
        ("run.trackers=[]", []),
        ("data.hf={config: small}", None),
        ("data.image_size=48", 48),
        ("run.dir=2024-01-31", "2024-01-31"),
        ("run.dir=2024-13-45", "2024-13-45"),
        ("run.dir='1e-3'", "1e-3"),
        ("run.dir=/a=b", "/a=b"),
        ("optim={lr: 7}", None),
    ],
)
def test_the_types_of_overrides(override: str, value: Any) -> None:
    more = ["data.format=hf", "data.root=x", "data.task=mine"] if "hf" in override else []
    recipe = load_recipe([], [*more, override])
    found: Any = recipe
    for key in override.partition("=")[0].split("."):
        found = getattr(found, key)
    if override.startswith("optim={"):
        assert recipe.optim.lr == 7
    elif "hf" in override:
        assert recipe.data.hf.config == "small"
    else:
        assert found == value
        assert type(found) is type(value)


def test_an_override_of_a_section_keeps_what_it_does_not_name(write: Write) -> None:
    file = write("a.yaml", "train: {epochs: 7, early_stop: {patience: 3, min_delta: 0.5}}")
    recipe = load_recipe([file], ["train={batch_size: 8}", "train.early_stop.patience=4"])
    assert recipe.train.epochs == 7
    assert recipe.train.batch_size == 8
    assert recipe.train.early_stop is not None
    assert (recipe.train.early_stop.patience, recipe.train.early_stop.min_delta) == (4, 0.5)
    assert load_recipe([file], ["train.early_stop=null"]).train.early_stop is None


def test_an_empty_section_changes_nothing(write: Write) -> None:
    write("a.yaml", "train: {epochs: 7}\nmethod: {prompts: 3}")
    recipe = load_recipe([write("b.yaml", "base: a.yaml\ntrain: {}\nmethod: {}")], ["train.early_stop={}"])
    assert recipe.train.epochs == 7
    assert recipe.method == VPTConfig(prompts=3)
    assert recipe.train.early_stop is not None


def test_another_method_drops_the_settings_of_the_old_one(write: Write) -> None:
    write("vpt.yaml", "method: {name: vpt, prompts: 50, deep: false}")
    assert load_recipe([write("linear.yaml", "base: vpt.yaml\nmethod: {name: linear}")]).method == LinearConfig()
    assert load_recipe([write("b.yaml", "base: vpt.yaml")], ["method.name=linear"]).method == LinearConfig()
    same = load_recipe([write("c.yaml", "base: vpt.yaml\nmethod: {name: vpt, prompts: 7}")]).method
    assert same == VPTConfig(prompts=7, deep=False)
    back = load_recipe([write("d.yaml", "base: linear.yaml\nmethod: {name: vpt, prompts: 7}")]).method
    assert back == VPTConfig(prompts=7)


def test_a_method_without_a_name_is_the_default_one(write: Write) -> None:
    assert load_recipe([write("a.yaml", "method: {prompts: 3}")]).method == VPTConfig(prompts=3)


def test_bytes_that_are_no_text() -> None:
    """As in a terminal with another encoding."""
    assert refused("run.dir=caf\udce9") == [
        r"command line: run.dir=caf\xe9: not text in UTF-8; rename the file, or set LC_ALL=C.UTF-8"
    ]


def test_the_order_of_overrides_of_a_method_does_not_matter(write: Write) -> None:
    file = write("a.yaml", "method: {name: linear}")
    for overrides in (["method.name=vpt", "method.prompts=3"], ["method.prompts=3", "method.name=vpt"]):
        assert load_recipe([file], overrides).method == VPTConfig(prompts=3)
    assert refused("method.prompts=3", "method.name=linear") == [
        "command line: method.prompts = 3: unknown key; valid: head, name, reads"
    ]


@pytest.mark.parametrize(
    ("argv", "files", "overrides"),
    [
        (["a.yaml", "b.c=1", "d.yaml"], ["a.yaml", "d.yaml"], ["b.c=1"]),
        (["/x/a=b.yaml", "seed=1"], ["/x/a=b.yaml"], ["seed=1"]),
        (["./seed=1"], ["./seed=1"], []),
        ([], [], []),
        (["data.root=/a b=c"], [], ["data.root=/a b=c"]),
    ],
)
def test_files_and_overrides_are_distinguished(argv: list[str], files: list[str], overrides: list[str]) -> None:
    assert split_arguments(argv) == (files, overrides)


# Mistakes


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("sed: 3", "1: sed = 3: unknown key; did you mean 'seed'?"),
        ("bas: x.yaml", "1: bas = 'x.yaml': unknown key; did you mean 'base'?"),
        ("optm: {lr: 1}", "1: optm = {'lr': 1}: unknown key; did you mean 'optim'?"),
        ("seed: 1\noptim:\n  lr: 1\n  momentun: 0.9", "4: optim.momentun = 0.9: unknown key; did you mean 'momentum'?"),
        (
            "train:\n  early_stop:\n    patient: 3",
            "3: train.early_stop.patient = 3: unknown key; did you mean 'patience'?",
        ),
        ("method:\n  name: vpt\n  promts: 5", "3: method.promts = 5: unknown key; did you mean 'prompts'?"),
        ("method:\n  name: linear\n  prompts: 5", "3: method.prompts = 5: unknown key; valid: head, name, reads"),
        ("data: {hf: {imag: x}}", "1: data.hf.imag = 'x': unknown key; did you mean 'image'?"),
        ("backbone: {nam: x}", "1: backbone.nam = 'x': unknown key; did you mean 'name'?"),
        ("runtime: {precison: x}", "1: runtime.precison = 'x': unknown key; did you mean 'precision'?"),
        ("run: {dri: x}", "1: run.dri = 'x': unknown key; did you mean 'dir'?"),
        ("optim.lr: 3", "1: optim.lr = 3: unknown key; did you mean 'optim'?"),
        (
            "on: 3",
            "1: on = 3: unknown key; "
            "valid: backbone, backbones, base, data, method, optim, protocol, published, run, runtime, seed, stream, "
            "sweep, train",
        ),
    ],
)
def test_an_unknown_key_and_the_nearest_name_at_every_level(text: str, mistake: str, write: Write) -> None:
    file = write("a.yaml", text)
    assert refused(files=(file,)) == [f"{file}:{mistake}"]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("seed: x", "seed = 'x': must be a valid integer"),
        ("seed: null", "seed = None: must be a valid integer"),
        ("train: {epochs: true}", "train.epochs = True: must be a valid integer"),
        ("train: {epochs: '3'}", "train.epochs = '3': must be a valid integer"),
        ("train: {epochs: 1.5}", "train.epochs = 1.5: must be a valid integer"),
        ("train: {test: 1}", "train.test = 1: must be a valid boolean"),
        ("train: {test: 'yes'}", "train.test = 'yes': must be a valid boolean"),
        ("train: 3", "train = 3: must be an object"),
        ("train: {early_stop: 3}", "train.early_stop = 3: must be an object"),
        ("method: linear", "method = 'linear': must be an object"),
        ("method: null", "method = None: must be an object"),
        ("method: {name: vppt}", "method.name = 'vppt': not a method; did you mean 'vpt'?"),
        (
            "method: {name: 3}",
            "method.name = 3: not a method; valid: adapter, adaptformer, bias, cls, combo, full, knn, ladder, linear, "
            "logistic, lora, mlp, partial, side, ssf, vpt, vqt",
        ),
        ("method: {prompts: []}", "method.prompts = []: must be a valid integer"),
        ("optim: {lr: fast}", "optim.lr = 'fast': must be a valid number"),
        ("optim: {name: adamm}", "optim.name = 'adamm': must be one of its choices; did you mean 'adam'?"),
        ("optim: {betas: [0.9]}", "optim.betas.1 = [0.9]: field required"),
        ("optim: {betas: 0.9}", "optim.betas = 0.9: must be a valid array"),
        ("run: {dir: 3}", "run.dir = 3: must be a valid string"),
        ("run: {trackers: [tensorbord]}", "run.trackers.0 = 'tensorbord': must be one of its choices; did you mean"),
        ("data: {task: [a]}", "data.task = ['a']: must be a valid string"),
        ("data: [a]", "data = ['a']: must be an object"),
    ],
)
def test_wrong_types(text: str, mistake: str, write: Write) -> None:
    file = write("a.yaml", text)
    (found,) = refused(files=(file,))
    assert found.startswith(f"{file}:1: {mistake}")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("seed=-1", "greater than or equal to 0"),
        (f"seed={2**63}", f"less than {2**63}"),
        ("train.epochs=0", "greater than or equal to 1"),
        ("train.batch_size=0", "greater than or equal to 1"),
        ("train.grad_accum_steps=0", "greater than or equal to 1"),
        ("train.eval_batch_size=0", "greater than or equal to 1"),
        ("train.eval_every=0", "greater than or equal to 1"),
        ("train.label_smoothing=1", "less than 1"),
        ("train.label_smoothing=-0.1", "greater than or equal to 0"),
        ("train.early_stop.patience=0", "greater than or equal to 1"),
        ("train.early_stop.min_delta=-1", "greater than or equal to 0"),
        ("optim.lr=0", "greater than 0"),
        ("optim.lr=.inf", "finite"),
        ("optim.lr=.nan", "finite"),
        ("optim.weight_decay=-1", "greater than or equal to 0"),
        ("optim.momentum=1", "less than 1"),
        ("optim.eps=0", "greater than 0"),
        ("optim.clip_norm=0", "greater than 0"),
        ("optim.warmup_epochs=-1", "greater than or equal to 0"),
        ("run.dir=''", "at least 1 character"),
        ("run.save_every=0", "greater than or equal to 1"),
        ("run.log_every=0", "greater than or equal to 1"),
        ("run.timeout_minutes=0", "greater than 0"),
        ("run.timeout_minutes=.inf", "finite"),
        ("backbone.drop_path=1", "less than 1"),
        ("backbone.weights=''", "at least 1 character"),
        ("method.prompts=0", "greater than or equal to 1"),
        ("method.dropout=1", "less than 1"),
        ("method.layers=0", "greater than or equal to 1"),
        ("method.projection=0", "greater than or equal to 1"),
    ],
)
def test_bounds(override: str, rule: str) -> None:
    (mistake,) = refused(override)
    assert mistake.startswith(f"command line: {override.partition('=')[0]} = ")
    assert rule in mistake


def test_each_beta_has_its_bound() -> None:
    assert refused("optim.betas=[1.0, -0.1]") == [
        "command line: optim.betas.0 = 1.0: must be less than 1; use a value below 1",
        "command line: optim.betas.1 = -0.1: must be greater than or equal to 0; use 0 or more",
    ]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["optim.warmup_epochs=5", "train.epochs=5"], "optim.warmup_epochs = 5.0: must be below train.epochs = 5"),
        (
            ["train.batch_size=10", "train.grad_accum_steps=3"],
            "train.grad_accum_steps = 3: must divide train.batch_size = 10",
        ),
        (["train.early_stop={}", "data.train_on=trainval"], "train.early_stop needs a validation split"),
        (["backbone.drop_path=0.1", "method.name=linear"], "backbone.drop_path = 0.1: method.name = linear trains"),
        (
            ["method.name=linear", "runtime.activation_checkpointing=block"],
            "runtime.activation_checkpointing = block: method.name = linear",
        ),
        (
            ["optim.nesterov=true", "optim.name=adam"],
            "optim.nesterov = true: needs name = sgd and momentum above 0, not name = adam",
        ),
        (
            ["optim.nesterov=true", "optim.name=sgd", "optim.momentum=0"],
            "optim.nesterov = true: needs name = sgd and momentum above 0, not name = sgd and momentum = 0.0",
        ),
        (["method.deep=false", "method.layers=2"], "these need deep prompts"),
        (["method.deep=false", "method.shared=true"], "these need deep prompts"),
        (["method.deep=false", "method.prompted_blocks=last"], "these need deep prompts"),
        (["data.root=x"], "digits come with scikit-learn"),
        (["data.task=nothing"], "nothing"),
        (["data.mean=[0, 0, 0]"], "mean and std go together"),
    ],
)
def test_rules_over_several_keys(overrides: list[str], rule: str) -> None:
    (mistake,) = refused(*overrides)
    assert mistake.startswith("command line: ")
    assert rule in mistake


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.warmup_epochs=4.9", "train.epochs=5"],
        ["train.batch_size=9", "train.grad_accum_steps=3"],
        ["train.early_stop={}"],
        ["backbone.drop_path=0.1"],
        ["optim.name=sgd", "optim.nesterov=true"],
        ["method.layers=2", "method.prompted_blocks=last", "method.shared=true"],
        ["data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"],
    ],
)
def test_what_the_rules_allow(overrides: list[str]) -> None:
    load_recipe([], overrides)


def test_a_rule_over_several_keys_names_all_places(write: Write) -> None:
    file = write("a.yaml", "seed: 1\ntrain:\n  epochs: 3\noptim:\n  warmup_epochs: 4")
    assert refused(files=(file,)) == [
        f"{file}:5, {file}:3: optim.warmup_epochs = 4.0: must be below train.epochs = 3; lower it or raise train.epochs"
    ]
    (mistake,) = refused("train.epochs=2", files=(file,))
    assert mistake.startswith(f"{file}:5, command line: ")


def test_all_mistakes_at_once_each_with_its_place(write: Write) -> None:
    base = write("base.yaml", "seed: -1\noptim:\n  lr: fast")
    file = write("a.yaml", "base: base.yaml\ntrain:\n  epochs: 0\n  batchsize: 3\nmethod: {prompts: x}")
    assert refused("run.dirr=x", "backbone.load=lazy", files=(file,)) == [
        f"{base}:1: seed = -1: must be greater than or equal to 0; use 0 or more",
        "command line: backbone.load = 'lazy': must be one of its choices; valid: lenient, strict",
        f"{file}:5: method.prompts = 'x': must be a valid integer; use a whole number such as 3, without quotes",
        f"{base}:3: optim.lr = 'fast': must be a valid number; use a number such as 0.1, without quotes",
        f"{file}:3: train.epochs = 0: must be greater than or equal to 1; use 1 or more",
        f"{file}:4: train.batchsize = 3: unknown key; did you mean 'batch_size'?",
        "command line: run.dirr = 'x': unknown key; did you mean 'dir'?",
    ]


def test_all_rules_at_once() -> None:
    mistakes = refused("optim.warmup_epochs=5", "train.epochs=5", "train.grad_accum_steps=7", "data.train_on=trainval",
                       "train.early_stop={}")  # fmt: skip
    assert [mistake.split(" ")[2] for mistake in mistakes] == [
        "optim.warmup_epochs",
        "train.grad_accum_steps",
        "train.early_stop",
    ]


def test_file_and_value_mistakes_come_together(write: Write, tmp_path: Path) -> None:
    mistakes = refused("seed=x", "optim.lr=[", files=(tmp_path / "nix.yaml",))
    assert mistakes[0] == f"command line: {tmp_path}/nix.yaml: no such recipe file; correct the path"
    assert mistakes[1].startswith("command line: optim.lr=[: the value is not valid YAML")
    assert mistakes[2].startswith("command line: seed = 'x'")


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("a: [", ":1: not valid YAML"),
        ("seed: 1\noptim:\n\tlr: 1", ":3: not valid YAML"),
        ("seed: 1\noptim: {lr: 1}\nseed: 2", ":3: not valid YAML: duplicate key seed; keep one of the two"),
        ("optim:\n  lr: 1\n  lr: 2", ":3: not valid YAML: duplicate key lr; keep one of the two"),
        ("seed: 1\n---\nseed: 2", ":2: not valid YAML"),
        ("seed: !!int x", ": not valid YAML"),
        ("seed: !!python/object:os.system x", ":1: not valid YAML"),
        ("- 1", ":1: a recipe is a mapping of keys to values, not a list"),
        ("3", ":1: a recipe is a mapping of keys to values, not a int"),
    ],
)
def test_files_that_are_no_recipes(text: str, mistake: str, write: Write) -> None:
    file = write("a.yaml", text)
    (found,) = refused(files=(file,))
    assert found.startswith(f"{file}{mistake}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(files=(tmp_path / "binary.yaml",))[0]
    assert "cannot be read" in refused(files=(tmp_path,))[0]


def test_an_empty_file_sets_nothing(write: Write) -> None:
    recipe = load_recipe([write("empty.yaml", "# nothing\n")])
    assert recipe.train == Recipe().train
    assert recipe.run.dir == "runs/empty"


def test_anchors_and_merges_are_understood(write: Write) -> None:
    file = write("a.yaml", "optim: &o {lr: 0.3}\ntrain: {epochs: 3}\nruntime: {}\n")
    assert load_recipe([file]).optim.lr == 0.3
    merged = write("b.yaml", "optim:\n  <<: {lr: 0.4, momentum: 0.1}\n  momentum: 0.2")
    assert (load_recipe([merged]).optim.lr, load_recipe([merged]).optim.momentum) == (0.4, 0.2)


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe([]).train.epochs = 3  # type: ignore[misc]


# Saving


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method.name=linear"],
        ["method.name=full", "runtime.precision=bf16"],
        ["method.layers=3", "method.prompted_blocks=last", "method.projection=7", "optim.betas=[0.8, 0.9]"],
        ["optim.lr=1e-7", "optim.eps=1e-30", "optim.weight_decay=3.3e-5", f"seed={2**63 - 1}"],
        ["run.dir='1e-3'", "backbone.weights='2024-01-01'", "run.trackers=[tensorboard, wandb]"],
        ["run.dir='true'", "backbone.weights='null'", "backbone.name='  spaces: and # signs '"],
        ["data.task=müsli ☃", "data.format=hf", "data.root=/a/b", "data.hf={splits: {val: 'train[90%:]'}}"],
        ["data.task=x", "data.format=hf", "data.root=y", "data.hf.revision='12e34'", "train.early_stop={patience: 2}"],
    ],
)
def test_the_resolved_recipe_loads_again_as_an_equal_one(overrides: list[str], write: Write) -> None:
    recipe = load_recipe([], overrides)
    file = write("resolved.yaml", recipe.to_yaml())
    assert load_recipe([file]) == recipe
    assert differences(recipe, load_recipe([file])) == []


def test_the_resolved_recipe_spells_out_every_key() -> None:
    resolved = yaml.safe_load(load_recipe([]).to_yaml())
    assert {name: set(section) for name, section in resolved.items() if isinstance(section, dict)} == {
        name: set(type(section).model_fields)
        for name, section in load_recipe([])
        if hasattr(type(section), "model_fields")
    }


def test_differences_are_named_by_key() -> None:
    old = load_recipe([], ["optim.lr=0.1", "method.prompts=3"])
    new = load_recipe([], ["optim.lr=0.2", "method.name=linear", "train.early_stop={patience: 2}"])
    found = differences(old, new)
    assert {"optim.lr: 0.1 -> 0.2", "method.name: vpt -> linear", "method.prompts: 3 -> None"} <= set(found)
    assert "train.early_stop.patience: None -> 2" in found
    assert not [line for line in found if line.startswith(("seed", "data", "run"))]


# The schema and the recipes that come with the package


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if node.get("type") == "object" and "properties" in node:
            yield node
        for value in node.values():
            yield from _objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from _objects(value)


def test_the_schema_names_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"base", "published", *Recipe.model_fields}
    named = {model["title"]: set(model["properties"]) for model in _objects(schema)}
    resolved = load_recipe([], ["train.early_stop={}"])
    sections = [s for _, s in resolved if hasattr(s, "model_fields")]
    sections += [resolved.data.hf, resolved.train.early_stop, LinearConfig()]
    assert len(sections) == 12
    for section in sections:
        assert named[type(section).__name__] == set(type(section).model_fields)
    assert all(model.get("additionalProperties") is False for model in _objects(schema))


def test_every_key_has_a_description() -> None:
    undescribed = [
        f"{model['title']}.{key}"
        for model in _objects(json_schema())
        for key, value in model["properties"].items()
        if not value.get("description", "").strip() and "const" not in value  # a method's own name needs none
    ]
    assert undescribed == []


def test_the_schema_file_is_up_to_date() -> None:
    saved = json.loads((CONFIGS / "recipe.schema.json").read_text())
    assert saved == json.loads(json.dumps(json_schema())), "dist-vpt recipe schema > configs/recipe.schema.json"


def test_every_recipe_in_configs_loads() -> None:
    files = sorted(CONFIGS.glob("**/*.yaml"))
    assert len(files) == RECIPE_FILES
    for file in files:
        recipe = load_recipe([file], ["data.root=somewhere"] if file.parent.name in ("data", "vtab", "fgvc") else [])
        assert math.isfinite(recipe.optim.peak_lr(recipe.train.batch_size))


def test_every_recipe_in_configs_points_its_editor_at_the_schema() -> None:
    for file in CONFIGS.glob("**/*.yaml"):
        found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", file.read_text())
        assert found, file
        assert (file.parent / found[1]).resolve() == CONFIGS / "recipe.schema.json"


def test_rules_over_several_keys_are_reported_beside_wrong_keys() -> None:
    mistakes = refused("train.epochs=0", "train.grad_accum_steps=3", "optim.lrr=1")
    assert len(mistakes) == 3
    assert sum("train.grad_accum_steps = 3: must divide" in mistake for mistake in mistakes) == 1


def test_a_rule_that_only_a_default_breaks_is_not_reported() -> None:
    assert len(refused("train.epochs=0", "optim.warmup_epochs=200")) == 1


def test_the_demo_backbone_on_other_images_is_warned_of() -> None:
    (warning,) = load_recipe([], ["data.task=dtd", "data.root=somewhere"]).warnings
    assert warning.startswith("the backbone is demo, which was trained on printed letters of 24 px only; for other ")
    assert load_recipe([], ["data.task=dtd", "data.root=somewhere", "backbone.name=sup_b16_in21k"]).warnings == []
    assert load_recipe([]).warnings == []


def test_a_color_that_begins_with_a_number_sign_is_text(tmp_path: Path) -> None:
    own = ["data.task=mine", "data.format=image_folder", f"data.root={tmp_path}"]
    assert load_recipe([], [*own, "data.background=#0a0B0c"]).data.background == "#0a0B0c"

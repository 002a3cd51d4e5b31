"""Model cards: valid front matter, the run's own numbers, and code that runs as it is printed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_vpt.cli.main import main
from dist_vpt.inference.load import load_run
from dist_vpt.inference.model_card import Shared, model_card, plain, size, wrapped
from dist_vpt.inference.push import push
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.sharing import shared_recipe
from tests.inference.hub_server import Hub
from tests.running import train

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LAST = {"epoch": 3, "val": {"top1": 71.5, "loss": 0.5}, "test": {"top1": 70.25, "top5": 99.0, "loss": 0.51234}}


def card_of(*overrides: str, **changes: Any) -> str:
    facts: dict[str, Any] = {
        "repo": "me/flowers",
        "recipe": shared_recipe(load_recipe([], overrides)),
        "result": {"last": LAST, "best": LAST | {"epoch": 2, "test": {"top1": 69.0}}},
        "classes": ["a", "b"],
        "adapters": "last",
        "adapter_bytes": 123_456,
        "sweep": None,
        "peft": False,
        "license": None,
    }
    return model_card(Shared(**(facts | changes)))


def front_matter(card: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return head


def block(card: str, section: str, language: str) -> str:
    """The first block of code of a section."""
    found = re.search(rf"## {section}.*?```{language}\n(.*?)```", card, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("overrides", "base", "license"),
    [
        (["backbone.name=demo"], None, "apache-2.0"),
        (["backbone.name=dinov2_s14"], "timm/vit_small_patch14_dinov2.lvd142m", "apache-2.0"),
        (["backbone.name=mae_b16"], "timm/vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        (["backbone.name=dinov3_s16"], "timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license"),
        (["backbone.name=mocov3_b16", "backbone.weights=w.pth"], None, "cc-by-nc-4.0"),
        (["backbone.name=vit_tiny_patch16_224", "backbone.weights=w.pth"], None, None),
        (["backbone.name=vit_tiny_patch16_224.augreg_in21k"], "timm/vit_tiny_patch16_224.augreg_in21k", "apache-2.0"),
        (["backbone.name=dinov2_s14", "backbone.weights=random"], None, None),
    ],
)
def test_where_the_weights_come_from(overrides: list[str], base: str | None, license: str | None) -> None:
    card = card_of(*overrides, "data.image_size=224")
    head = front_matter(card)
    assert head.get("base_model") == base
    assert head.get("license_name", head.get("license")) == license
    assert (head.get("license") == "other") == (license == "dinov3-license")
    assert ("https://huggingface.co/" in card) == (base is not None)
    assert front_matter(card_of(*overrides, "data.image_size=224", license="mit"))["license"] == "mit"


def test_front_matter() -> None:
    head = front_matter(card_of("data.task=a", "data.format=hf", "data.root=me/flowers", "method.name=full"))
    assert head["library_name"] == "dist-vpt"
    assert head["tags"] == ["dist-vpt", "image-classification", "vision-transformer", "full"]
    assert head["datasets"] == ["me/flowers"]
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": 0.7025, "name": "top-1 accuracy"}]
    several = card_of("backbones=[dinov2_s14,mae_b16]", "method.name=linear")
    assert front_matter(several)["base_model"] == [
        "timm/vit_small_patch14_dinov2.lvd142m",
        "timm/vit_base_patch16_224.mae",
    ]
    assert "license" not in front_matter(several)  # theirs differ
    assert "In plain timm" not in several


def test_several_labels_an_image() -> None:
    """Thresholds are those of the run, or 0.5 where it had no val, as the seeds of a sweep."""
    table = ("data.task=x", "data.format=table", "data.root=x.csv", "data.labels=multiple")
    test = {"mAP": 97.5, "f1_macro": 91.0, "loss": 0.2}
    for last, said in (({"thresholds": [0.3, 0.6]}, "the threshold that was chosen on val"), ({}, "0.5")):
        card = card_of(*table, result={"last": {"epoch": 3, "test": test} | last})
        assert f"whose probability reaches {said}, and may get none" in " ".join(card.split())
        assert front_matter(card)["metrics"] == ["mean_average_precision"]
        assert "| binary cross-entropy | 0.200 |" in card
        assert 'model.predict(["photo.jpg"])' in card


def test_scores_of_one_seed_and_of_several() -> None:
    one = card_of()
    assert "| score | val | test |\n|---|--:|--:|\n| top-1 accuracy, % | 71.50 | 70.25 |\n" in one
    assert "| top-5 accuracy, % | - | 99.00 |\n| cross-entropy | 0.500 | 0.512 |\n" in one
    assert "after the last epoch (3 of 100)" in one
    assert "One seed shows no spread" in one
    assert "| top-1 accuracy, % | 71.50 | 69.00 |" in card_of(adapters="best")
    sweep = {
        "test": {"top1": {"mean": 70.5, "std": 0.25, "values": [70.25, 70.75]}},
        "seeds": {"1": {}, "2": {}, "3": None},
        "diverged_seeds": {"3": "loss"},
        "trials": [{}] * 20,
        "chosen": {"optim.lr": 0.003, "optim.weight_decay": 0.0},
    }
    several = card_of(sweep=sweep)
    assert "| score | val | test | test, mean ± std of 2 seeds |" in several
    assert "| top-1 accuracy, % | 71.50 | 70.25 | 70.50 ± 0.25 |" in several
    assert "| cross-entropy | 0.500 | 0.512 | - |" in several
    assert "over seeds 1, 2, with the setting that was best on val among\n20 trials: `optim.lr=0.003`," in several
    more = {
        "extra_tests": {"sketch": {"top1": 40.0}},
        "test": LAST["test"] | {"ece": 3.21},
        "temperature": {"value": 1.5},
    }
    extra = card_of(result={"last": LAST | more, "best": None})
    assert "| score | val | test | sketch |\n" in extra
    assert "| top-1 accuracy, % | 71.50 | 70.25 | 40.00 |\n" in extra
    assert "| expected calibration error, % | - | 3.21 | - |\n" in extra
    unscored = card_of(result={"last": {"epoch": 3, "val": {"top1": 71.5}}, "best": None})
    assert "The run was not scored on a test split." in unscored
    assert "model-index" not in front_matter(unscored)


def test_names_cannot_add_markup() -> None:
    card = card_of(classes=["a|b", "<script>x</script>", "[link](http://x)", "two\nlines", "`code`"])
    assert r"5: a\|b, \<script\>x\</script\>, \[link\](http://x), two lines, \`code\`" in card
    assert plain("a_b*c#d") == r"a\_b\*c\#d"
    many = card_of(classes=[f"c{n}" for n in range(101)])
    assert "101: c0, c1," in many
    assert "c99, ... |" in many


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (70_700, "70.7 kB"), (5e6, "5 MB"), (2.5e9, "2.5 GB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_long_calls_are_broken_between_arguments() -> None:
    code = f"model = f({', '.join(f'argument_{n}={n}' for n in range(20))})\nmodel.g()"
    lines = wrapped(code).splitlines()
    assert max(map(len, lines)) <= 88
    assert compile(wrapped(code), "", "exec").co_consts == compile(code, "", "exec").co_consts


def test_positions_that_timm_resamples_otherwise() -> None:
    overrides = ["method.name=lora", "backbone.name=sup_b16_in21k", "backbone.position_resize=vpt"]
    note = "# timm resamples the positions in another way"
    assert note in card_of(*overrides, "data.image_size=384", peft=True)
    assert note not in card_of(*overrides, peft=True)


def test_the_code_of_a_card_gives_the_runs_logits(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain timm after `dist-vpt merge`, and in PEFT from the repository itself."""
    run = tmp_path / "run"
    train(run, "method.name=lora", "train.epochs=2", "run.trackers=[]")
    push(str(run), "hub:me/digits")
    card = hub.files("me/digits")["README.md"].decode()
    loaded = load_run(str(run), "last")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = loaded.method(images)
    normalized, tolerance = loaded.method.backbone.normalized(images), 1e-5 * float(expected.abs().max())
    monkeypatch.chdir(tmp_path)
    assert main(block(card, "In plain timm", "shell").split()[1:]) == 0
    names: dict[str, Any] = {}
    exec(block(card, "In plain timm", "python"), names)
    with torch.no_grad():
        assert torch.allclose(names["model"].eval()(normalized), expected, rtol=1e-4, atol=10 * tolerance)
    pytest.importorskip("peft")
    made, attach = block(card, "In PEFT", "python").split("# load the weights of demo into model\n")
    exec(made, names)
    frozen = {loaded.method.backbone.timm_name(n): t for n, t in loaded.method.backbone.state_dict().items()}
    names["model"].load_state_dict(frozen, strict=False)
    exec(attach, names)
    with torch.no_grad():
        assert torch.allclose(names["model"](normalized), expected, rtol=1e-5, atol=tolerance)
    assert json.loads(hub.files("me/digits")["classes.json"]) == [str(n) for n in range(10)]

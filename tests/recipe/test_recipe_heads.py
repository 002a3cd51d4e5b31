"""The heads of the recipes in configs/method and configs/backbone: command, result, source and cost."""

import re
import shlex
from pathlib import Path

import pytest

from dist_vpt.backbones.weights.zoo import ZOO
from dist_vpt.cli.main import build_parser
from dist_vpt.data.tasks import TASKS
from dist_vpt.experiments.suite_plan import plan_experiments
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.report.published import published
from tests.running import ROOT

METHODS = sorted((ROOT / "configs" / "method").glob("*.yaml"))
BACKBONES = sorted((ROOT / "configs" / "backbone").glob("*.yaml"))


def head(file: Path) -> str:
    """The comment that a recipe begins with, its lines joined but for those of commands."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("#")]
    return re.sub(r"\n(?!  )", " ", "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines))


def command(file: Path) -> list[str]:
    """The arguments of the first command in a recipe's head."""
    found = re.search(r"^ *# {3}dist-vpt ((?:.*\\\n# +)*.*)", file.read_text(), re.MULTILINE)
    assert found, f"{file}: no command"
    return shlex.split(re.sub(r"\\\n# +", " ", found[1]))


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_a_methods_head_gives_command_result_and_cost(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, more = build_parser().parse_known_args(command(file))
    assert not more
    pairs = plan_experiments(arguments.tasks, arguments.method, arguments.recipe, ".", arguments.out)
    assert len(pairs) == 19
    assert arguments.method == [file.stem]
    assert re.search(
        r"Cost of a step on 64 images .*: [\d,]+ trained numbers, \d\.\d GiB by `dist-vpt plan`", head(file)
    )
    assert "Expected" in head(file)


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.stem)
def test_an_expected_result_is_the_published_one(file: Path) -> None:
    """As the package has it for the method, or for the row that the head names."""
    expected = re.search(
        r"Expected .*ViT-B/16, (.*?): ([\d.]+) / ([\d.]+) / ([\d.]+) \((.*? (?:paper|study)).*?(?:, row (\w+))?\)",
        head(file),
    )
    rows = [
        row for row in published() if {*row.top1} >= {name for name, task in TASKS.items() if task.group == "natural"}
    ]
    if expected is None:
        assert "no published table" in head(file)
        assert not any(file.stem in (row.method, row.name) for row in rows)
        return
    backbone, *means, label, name = expected.groups()
    (row,) = [
        row
        for row in rows
        if row.name == (name or file.stem) and row.label.lower() == label.lower() and backbone in row.backbone
    ]
    for group, mean in zip(("natural", "specialized", "structured"), means, strict=True):
        scores = [row.top1[task] for task, of in TASKS.items() if of.group == group]
        assert float(mean) == pytest.approx(sum(scores) / len(scores), abs=0.051)
    assert row.verified or "not verified" in head(file)
    assert not row.differs or "whose protocol is another" in head(file)


@pytest.mark.parametrize("file", BACKBONES, ids=lambda file: file.stem)
def test_a_backbones_head_gives_command_source_and_license(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments, _ = build_parser().parse_known_args(command(file))
    name = load_recipe(*split_arguments(arguments.recipe)).backbone.name
    row = next(row for short, row in ZOO.items() if name in (short, row.pretrained))
    assert row.project.page in head(file)
    assert f"license {row.project.license}" in head(file)

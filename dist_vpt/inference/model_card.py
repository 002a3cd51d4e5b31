"""The model card of a shared run: README.md with the front matter of the Hugging Face hub."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from textwrap import fill
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from dist_vpt import __version__
from dist_vpt.backbones.build import preprocessing_of, timm_model, weights_source
from dist_vpt.methods import METHODS
from dist_vpt.methods.base import Method
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import NOT_SHARED, WEIGHTS
from dist_vpt.training.inputs import resolve_inputs

SCORES = {
    "top1": "top-1 accuracy, %",
    "mAP": "mean average precision, %",
    "top5": "top-5 accuracy, %",
    "per_class": "mean accuracy of the classes, %",
    "f1_macro": "F1, mean of the classes, %",
    "f1_micro": "F1 of all decisions, %",
    "auroc": "area under the ROC curve, %",
    "ece": "expected calibration error, %",
    "ece_scaled": "the same at the temperature fitted on val, %",
    "loss": "cross-entropy",
}
CODE_WIDTH = 88  # characters of a line of code
MOST_CLASSES = 100  # whose names the card lists
LICENSES = (  # that the hub knows by these names; others are given it by license_name
    *("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "openrail"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


@dataclass(frozen=True)
class Shared:
    """What a card says of a run."""

    repo: str  # user/name
    recipe: Recipe  # without paths of the machine that trained it
    result: Mapping[str, Any]  # content of result.json
    classes: Sequence[str]
    adapters: str  # last or best
    adapter_bytes: int
    sweep: Mapping[str, Any] | None  # content of the sweep.json that the run's seed belongs to
    peft: bool  # whether PEFT's files are beside it
    license: str | None  # None: that of the backbone's weights


def model_card(run: Shared) -> str:
    """README.md: front matter, then what the run is, its scores, and how to use it."""
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(  # Markdown, not HTML: names are escaped for it by `plain`
        autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"plain": plain, "size": size, "score": score, "wrapped": wrapped, "quoted": shlex.quote}
    recipe, inputs = run.recipe, resolve_inputs(run.recipe)
    scores = _scores(run)
    splits = [name for name in ("val", "test", *scores.get("extra_tests", ())) if name in scores]
    keys = list(dict.fromkeys(key for split in splits for key in scores[split]))
    return environment.from_string(template).render(
        run=run,
        recipe=recipe,
        result=run.result,
        name=run.repo.partition("/")[2],
        front_matter=yaml.safe_dump(_front_matter(run), sort_keys=False, allow_unicode=True, width=110),
        method=_method(recipe),
        members=list(zip(recipe.members, inputs.of_each, strict=True)),
        sources=[weights_source(member)[0] for member in recipe.members],
        file=WEIGHTS.fullmatch(recipe.backbone.weights),
        scores=scores,
        splits=splits,
        headline=next((key for key in ("top1", "mAP") if key in (scores.get("test") or {})), None),
        several_labels=recipe.data.labels == "multiple",
        thresholds="thresholds" in scores,
        names={key: _shown(recipe, key) for key in sorted(keys, key=[*SCORES, *keys].index)},
        seeds=_seeds(run.sweep),
        weights_from=_weights_from(recipe),
        protocol=run.result.get("protocol") or {},
        needs_root=recipe.data.root == NOT_SHARED,
        most_classes=MOST_CLASSES,
        timm=_merged(run, inputs.transform.image_size),
        base=_base(run, inputs.transform.image_size) if run.peft else "",
        version=__version__,
    )


def _shown(recipe: Recipe, key: str) -> str:
    """A score in words."""
    if key == "loss" and recipe.data.labels == "multiple":
        return "binary cross-entropy"
    return SCORES.get(key, key)


def plain(text: object) -> str:
    """Text in which Markdown sees no markup and no line ends: class names come from folders and files."""
    return MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def size(count: int) -> str:
    """Bytes for people, in powers of ten, as the hub shows them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def score(value: float | None, key: str) -> str:
    return "-" if value is None else f"{value:.3f}" if key == "loss" else f"{value:.2f}"


def wrapped(code: str) -> str:
    """Lines of Python with calls broken between their arguments, so that a page shows them whole."""
    return "\n".join(
        fill(line, CODE_WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        for line in code.splitlines()
    )


def _weights_from(recipe: Recipe) -> str:
    """Where the weights of the only backbone come from, for the list at the top."""
    if recipe.method.name == "full" or recipe.backbones:
        return ""
    backbone = recipe.backbone
    if backbone.weights == "random":
        return f"; its weights are random, of seed {recipe.seed}"
    if backbone.weights != "pretrained":
        return "; its weights are in a file that is not in this repository (below)"
    source = weights_source(backbone)[0]
    where = f"from [{source}](https://huggingface.co/{source})" if source else "with dist-vpt"
    return f"; its weights come {where}"


def _scores(run: Shared) -> dict[str, Any]:
    """Epoch, and scores by split, of the adapters that are shared; extra test sets are splits, too."""
    found = run.result.get(run.adapters) or {}
    return {**(found.get("extra_tests") or {}), **found}


def _front_matter(run: Shared) -> dict[str, Any]:
    recipe = run.recipe
    sources = list(dict.fromkeys(source for member in recipe.members if (source := weights_source(member)[0])))
    dataset = recipe.data.root if recipe.data.stored == "hf" and recipe.data.root != NOT_SHARED else None
    found: dict[str, Any] = {
        "library_name": "dist-vpt",
        "pipeline_tag": "image-classification",
        "tags": ["dist-vpt", "image-classification", "vision-transformer", recipe.method.name],
        **_license(run),
        "base_model": sources[0] if len(sources) == 1 else sources,
        "base_model_relation": "finetune" if recipe.method.name in ("full", "partial") else "adapter",
        "datasets": [dataset] if dataset else None,
        "metrics": ["mean_average_precision" if recipe.data.labels == "multiple" else "accuracy"],
        "model-index": _model_index(run, dataset),
    }
    if not sources:
        del found["base_model"], found["base_model_relation"]
    return {key: value for key, value in found.items() if value}


def _license(run: Shared) -> dict[str, str]:
    """That which the user names, else that of all backbones' weights, without which the run is of no use."""
    licenses = {weights_source(member)[1] for member in run.recipe.members}
    name = run.license or (licenses.pop() if len(licenses) == 1 else None)
    if name is None or name in LICENSES:
        return {"license": name} if name else {}
    return {"license": "other", "license_name": name}


def _model_index(run: Shared, dataset: str | None) -> list[dict[str, Any]]:
    """The scores as the hub's page shows them beside the card, from 0 to 1."""
    test = _scores(run).get("test") or {}
    if test.get("top1") is None:
        return []
    task, data = run.recipe.data.task, {"name": run.recipe.data.task, "type": dataset or run.recipe.data.task}
    metric = {"type": "accuracy", "value": round(test["top1"] / 100, 4), "name": "top-1 accuracy"}
    result = {"task": {"type": "image-classification"}, "dataset": data | {"split": "test"}, "metrics": [metric]}
    return [{"name": f"{run.recipe.method.name} on {task}", "results": [result]}]


def _method(recipe: Recipe) -> str:
    """What the method is and where it was published: the first sentence of its module."""
    module = import_module(METHODS[recipe.method.name].partition(":")[0])
    first = (getdoc(module) or recipe.method.name).split("\n\n")[0]
    return re.sub(r"\. (A|Readers?|Writers?)\b.*", "", " ".join(first.split())).rstrip(".")


def _seeds(sweep: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Test scores over the seeds of a sweep, where it has several."""
    if sweep is None:
        return None
    seeds = [seed for seed in sweep["seeds"] if seed not in sweep["diverged_seeds"]]
    if len(seeds) < 2:
        return None
    trials = len(sweep["trials"])
    return {"scores": sweep["test"], "seeds": seeds, "trials": trials, "chosen": sweep["chosen"]}


def _base(run: Shared, image_size: int) -> str:
    """The Python that makes the timm model with the weights that an adapter of PEFT goes on."""
    backbone = run.recipe.backbone
    made = timm_model(backbone, image_size, len(run.classes))
    if not (source := weights_source(backbone)[0]):
        return f"{made}\n# load the weights of {backbone.name} into model"
    options, resampled = {"pretrained": True, **made.options}, ""
    if backbone.positions == "vpt" and image_size != preprocessing_of(backbone).image_size:
        resampled = "# timm resamples the positions in another way than this run: for equal outputs see In plain timm\n"
    return resampled + str(replace(made, architecture=source.removeprefix("timm/"), options=options))


def _merged(run: Shared, image_size: int) -> str | None:
    """The Python that makes the timm model which merged weights fit, None where none does."""
    recipe = run.recipe
    module, _, name = METHODS[recipe.method.name].partition(":")
    merges = getattr(import_module(module), name).merged is not Method.merged
    merges = merges and getattr(recipe.method, "reads", "pooled") == "pooled" and recipe.runtime.quantize == "none"
    if not merges or recipe.backbones:
        return None
    return str(timm_model(recipe.backbone, image_size, len(run.classes)))

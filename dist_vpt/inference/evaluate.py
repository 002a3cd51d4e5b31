"""Scoring a split again with a run's adapters."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.data.formats.extra_tests import mean_scores
from dist_vpt.data.splits import Splits
from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError
from dist_vpt.files import read_json
from dist_vpt.inference.hub import adapters_file, open_run
from dist_vpt.inference.load import check_backbones, classes_of
from dist_vpt.recipe.sharing import require_dataset, with_weights
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.runs.class_table import ClassTable
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.score_files import Predictions, write_tables
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import leave_accelerate_as_it_is, make_accelerator
from dist_vpt.training.components import Components, build_components
from dist_vpt.training.engine import evaluate
from dist_vpt.training.final_scores import options_of


def evaluate_run(  # noqa: PLR0917 (the options of the command)
    run: str,
    split: str,
    adapters: str,
    overrides: Sequence[str] = (),
    out: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Score a split with a run's adapters, print it beside the number reported at the end of the run, return it.

    With test, the extra tests of the recipe and the overrides are scored, too: ``extra_tests`` in what is returned.
    ``out``: a folder for confusion.csv, per_class.csv and predictions.csv. Raises UserError where it cannot be written.
    """
    folder = open_run(run)
    recipe, launch = with_weights(folder.load(overrides), weights, run), LaunchEnv.current()
    require_dataset(recipe, run, folder.imported_from())
    select_device(recipe.runtime.device, launch)
    recipe, _ = resolve_precision(recipe)
    components = build_components(recipe, launch, trains=False)
    path = adapters_file(folder, adapters)
    tensors, facts = read_adapters(path)
    check_backbones(recipe, facts, path)
    splits = components.splits
    if list(splits.classes) != classes_of(facts, path):
        fix = "use the data.root of the run"
        if folder.imported_from():
            fix = "use its own data, or import it with --classes FILE: the dataset's classes in the order of the head"
        raise UserError(f"{run}: was trained on other classes than {recipe.data.task} has here; {fix}")
    restore(components.method, tensors, path)
    if out is not None:
        _make_folder(Path(out))
    with ExitStack() as leaving:
        leave_accelerate_as_it_is(leaving)
        accelerator = make_accelerator(recipe, launch)
        leaving.callback(accelerator.end_training)
        reported = _reported(folder, adapters)
        temperature = (reported.get("temperature") or {}).get("value")
        found, predictions = _score(components, accelerator, split, temperature, facts.get("thresholds"))
        extra = mean_scores({name: scores for name, scores in found.items() if name != split})
        if accelerator.is_main_process:
            before = {split: reported.get(split), **(reported.get("extra_tests") or {})}
            for name, scores in {split: found[split], **extra}.items():
                images = f"{len(splits[name]):,} images" if name in found else "mean over its sets"
                kind = "split" if name == split else "extra test"
                _show(f"{run}: {name} {kind}, {adapters} adapters, {images}", scores, before.get(name) or {})
            if out is not None:
                _write(Path(out), predictions, splits, adapters)
    return found[split] | ({"extra_tests": extra} if extra else {})


def _score(
    parts: Components,
    accelerator: RankAccelerator,
    split: str,
    temperature: float | None,
    thresholds: Sequence[float] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Predictions | ClassTable]]:
    """Scores and predictions of a split, and with test of the extra tests. A collective call.

    Of test and extra tests alone with the score ``ece_scaled``: the others were trained on, or gave the temperature.
    """
    model = accelerator.prepare_model(parts.method, evaluation_mode=True)
    found, predictions = {}, {}
    for name in ("test", *parts.splits.extra) if split == "test" else (split,):
        batches = parts.evaluation(name, accelerator.process_index, accelerator.num_processes)
        options = options_of(name, parts.splits, temperature if split == "test" else None, thresholds)
        scores = evaluate(accelerator, model, batches, len(parts.splits.classes), **options)
        batches.close()
        found[name] = scores.compute()
        if split == "test" and temperature is None and not parts.splits.train.multiple:
            found[name]["ece_scaled"] = None
        if scores.keep:
            predictions[name] = scores.predictions()
    return found, predictions


def _show(title: str, values: dict[str, Any], before: dict[str, Any]) -> None:
    table = Table(title=title)
    for column in ("score", "now", "reported by the run"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, value in values.items():
        table.add_row(name, *("-" if each is None else f"{each:.4f}" for each in (value, before.get(name))))
    Console().print(table)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); name another folder") from error


def _write(out: Path, predictions: dict[str, Predictions | ClassTable], splits: Splits, adapters: str) -> None:
    try:
        for name, found in predictions.items():
            for file in write_tables(out, found, splits[name], splits.classes, name, adapters):
                print(file)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); free space, or name another folder"
        ) from error


def _reported(folder: RunFolder, adapters: str) -> dict[str, Any]:
    if not folder.result.is_file():
        return {}
    return read_json(folder.result).get(adapters) or {}

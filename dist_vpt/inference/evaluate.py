"""Scoring a split again with a run's adapters."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError
from dist_vpt.files import read_json
from dist_vpt.inference.hub import adapters_file, open_run
from dist_vpt.inference.load import check_backbones, classes_of
from dist_vpt.recipe.sharing import NOT_SHARED, with_weights
from dist_vpt.runs.adapters import read_adapters, restore
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.components import build_components
from dist_vpt.training.engine import evaluate


def evaluate_run(
    run: str, split: str, adapters: str, overrides: Sequence[str] = (), weights: str | None = None
) -> dict[str, Any]:
    """Score a split with a run's adapters, print it beside the number reported at the end of the run, return it."""
    folder = open_run(run)
    recipe, launch = with_weights(folder.load(overrides), weights, run), LaunchEnv.current()
    if recipe.data.root == NOT_SHARED:
        raise UserError(f"{run}: the folder of its dataset is not shared with it; give data.root=FOLDER")
    select_device(recipe.runtime.device, launch)
    recipe, _ = resolve_precision(recipe)
    components = build_components(recipe, launch, trains=False)
    path = adapters_file(folder, adapters)
    tensors, facts = read_adapters(path)
    check_backbones(recipe, facts, path)
    restore(components.method, tensors, path)
    if list(components.splits.classes) != classes_of(facts, path):
        raise UserError(
            f"{run}: was trained on other classes than {recipe.data.task} has here; use the data.root of the run"
        )
    accelerator = make_accelerator(recipe, launch)
    model = accelerator.prepare_model(components.method, evaluation_mode=True)
    batches = components.evaluation(split, accelerator.process_index, accelerator.num_processes)
    scores = evaluate(accelerator, model, batches, len(components.splits.classes)).compute()
    batches.close()
    if accelerator.is_main_process:
        reported = _reported(folder, adapters).get(split, {})
        table = Table(title=f"{run}: {split} split, {adapters} adapters, {len(components.splits[split]):,} images")
        for column in ("score", "now", "reported by the run"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for name, value in scores.items():
            shown = ("-" if each is None else f"{each:.4f}" for each in (value, reported.get(name)))
            table.add_row(name, *shown)
        Console().print(table)
    accelerator.end_training()
    return scores


def _reported(folder: RunFolder, adapters: str) -> dict[str, Any]:
    if not folder.result.is_file():
        return {}
    return read_json(folder.result).get(adapters) or {}

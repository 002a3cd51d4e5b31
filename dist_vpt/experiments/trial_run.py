"""A trial that was trained with others, as a run folder of its own."""

from collections.abc import Mapping, Sequence

from dist_vpt.distributed.collectives import RankAccelerator
from dist_vpt.files import write_atomically
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.adapters import collect, write_adapters
from dist_vpt.runs.class_table import ClassTable
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import epoch_facts
from dist_vpt.runs.provenance import device_name
from dist_vpt.runs.result import run_result, write_result
from dist_vpt.runs.score_files import Predictions, write_all_tables
from dist_vpt.training.accelerator import strategy_name
from dist_vpt.training.components import Components
from dist_vpt.training.trial_state import Trial


def write_run(  # noqa: PLR0917 (what a run folder holds)
    recipe: Recipe,
    trial: Trial,
    parts: Components,
    accelerator: RankAccelerator,
    seconds: float,
    skipped: Sequence[str],
    predictions: Mapping[str, Predictions | ClassTable],
) -> str:
    """Write a trial as a run folder, for eval, predict and compress; returns a line for the log, or "".

    ``predictions``: by split, those on test and extra tests.
    """
    folder, tensors = RunFolder(str(recipe.run.dir)), collect(trial.reader)
    folder.path.mkdir(parents=True, exist_ok=True)
    facts = {"recipe": recipe.model_dump(mode="json"), "classes": list(parts.splits.classes)}
    write_adapters(folder.adapters, tensors, facts | epoch_facts(trial.progress.last))
    result = run_result(
        recipe,
        last=trial.progress.last,
        best=trial.progress.best,
        seconds=seconds,
        images_per_s=trial.progress.images / seconds if seconds else 0.0,
        parameters={
            "trained": sum(p.numel() for _, p in trial.reader.trainable()),
            "total": sum(p.numel() for p in trial.reader.parameters()),
        },
        skipped=skipped,
        device=device_name(accelerator.device),
        processes=accelerator.num_processes,
        strategy=strategy_name(accelerator),
        runtime=trial.reader.backbone.chosen,
        protocol=parts.protocol(),
        warnings=trial.progress.warnings,
    )
    write_result(folder, result)
    if seeded := parts.seeded():
        folder.write_splits(seeded)
    write_atomically(folder.recipe, recipe.to_yaml())
    folder.mark("done")
    return write_all_tables(folder.path, predictions, parts.splits)

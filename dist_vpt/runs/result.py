"""result.json: the outcome of a run, whether `train`, a sweep or a compression wrote it."""

from collections.abc import Iterable
from typing import Any

from dist_vpt.files import to_json, write_atomically
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.provenance import versions
from dist_vpt.runtime.peak_memory import peak_memory_mib


def run_result(
    recipe: Recipe,
    *,
    last: dict[str, Any],
    best: dict[str, Any] | None,
    seconds: float,
    images_per_s: float,
    parameters: dict[str, int],
    skipped: Iterable[str],
    device: str,
    processes: int,
    compression: dict[str, Any] | None = None,
    frozen_weights_mib: dict[str, float] | None = None,
    strategy: str | None = None,
    runtime: dict[str, str] | None = None,
    protocol: dict[str, Any] | None = None,
    warnings: Iterable[str] = (),
) -> dict[str, Any]:
    """The content of result.json; the peak of memory is this process's until now.

    ``last`` and ``best``: epoch and scores by split, after the last epoch and of the best one on val. ``seconds``: of
    training. ``parameters``: trained, total. ``device``: its name. ``runtime``: what its settings came to.
    ``warnings``: that it does not learn.
    """
    content = {
        "last": last,
        "best": best or None,
        "compression": compression,
        "seconds": round(seconds, 3),
        "images_per_s": round(images_per_s, 2),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "frozen_weights_mib": frozen_weights_mib,
        "parameters": parameters,
        "skipped_images": sorted(skipped),
        "warnings": list(warnings) or None,
        "device": device,
        "processes": processes,
        "strategy": strategy,
        "precision": recipe.runtime.precision,
        "runtime": runtime,
        "seed": recipe.seed,
        "protocol": protocol,
        "versions": versions(),
    }
    return {key: value for key, value in content.items() if value is not None or key == "best"}


def write_result(folder: RunFolder, result: dict[str, Any]) -> None:
    """Write result.json."""
    write_atomically(folder.result, to_json(result, indent=1) + "\n")

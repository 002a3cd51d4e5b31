"""``dist-vpt probe``: which backbone suits one's pictures: knn, logistic and linear on the frozen features of several.

    OUT/BACKBONE/METHOD/     a sweep, for eval and predict (seeds/0)
    OUT/streams/             the features, computed once, which later probes and sweeps read
    OUT/probe.json, .csv     the table

Each sweep is chosen on val, fitted to trainval and tested once; backbones are ranked by their best method on val.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.data.config import resolve
from dist_vpt.data.formats import open_splits
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Interrupted, RunFailed, RunFolderError, UserError
from dist_vpt.experiments.probe_plan import METHODS, Probed, plan_probe
from dist_vpt.experiments.sweep import check_splits, sweep
from dist_vpt.files import raising_disk_full, read_json, to_json, write_atomically
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RESUME_HINT

COLUMNS = ("rank", "backbone", "width", "method", "val_top1", "test_top1", "seconds", "chosen", "run", "failed")


def probe(arguments: Sequence[str], backbones: Sequence[str], out: str) -> list[dict[str, Any]]:
    """Sweep each method on each backbone; prints and writes the table, and returns its rows, the best backbone first.

    A backbone that fails is one row with its reason. Raises UserError for names that do not exist and a folder that
    holds something else, DataError for the data, RunFailed where all backbones failed.
    """
    if LaunchEnv.current().world_size > 1:
        raise UserError("probe: works on one process; start it without accelerate launch")
    plan, folder, console = plan_probe(arguments, backbones, out), Path(out), Console(highlight=False)
    first = next(iter(plan[0].recipes.values()))
    made_of = {"data": first.data.model_dump(mode="json"), "protocol": first.protocol}
    _refuse_other(folder, made_of)
    splits = open_splits(first.data, resolve(first.data))
    check_splits(splits)
    rows: list[dict[str, Any]] = []
    with StopSignal() as stop:
        for probed in plan:
            if stop.requested:  # between two sweeps, each of which stops by itself
                raise Interrupted(f"{folder}: stopped; {RESUME_HINT}")
            try:
                rows += [_swept(probed, name, len(splits.train), len(splits.classes), console) for name in METHODS]
            except (Interrupted, RunFolderError):
                raise
            except UserError as error:
                rows = [row for row in rows if row["backbone"] != probed.backbone]
                rows.append(_row(probed.backbone, failed=str(error).splitlines()[0]))
                console.print(f"{probed.backbone}: failed: {rows[-1]['failed']}", markup=False, soft_wrap=True)
            _write(folder, made_of, _ranked(rows))
    rows = _ranked(rows)
    _show(rows, folder, console)
    if all(row["failed"] for row in rows):
        raise RunFailed(f"probe: none of {len(plan)} backbones could be used; the reasons are above and in {folder}")
    return rows


def _swept(probed: Probed, method: str, images: int, classes: int, console: Console) -> dict[str, Any]:
    recipe = _votes_of(probed.recipes[method], images)
    content, folder = sweep(recipe, Console(quiet=True)), Path(str(recipe.run.dir))
    run = folder / "seeds" / str(recipe.sweep.seeds[0])
    # A linear head has classes x (width + 1) numbers.
    width = read_json(run / "result.json")["parameters"]["trained"] // classes - 1 if method != "knn" else None
    chosen = next(trial for trial in content["trials"] if trial["setting"] == content["chosen"])
    row = _row(
        probed.backbone,
        method=method,
        width=width,
        val_top1=round(chosen["last"]["val"]["top1"], 2),
        test_top1=round(content["test"]["top1"]["mean"], 2),
        seconds=content["seconds"]["of this session"],
        chosen=content["chosen"],
        run=str(run),
    )
    found = f"val {row['val_top1']:.2f} %, test {row['test_top1']:.2f} %, {row['seconds']:.1f} s"
    console.print(f"{probed.backbone}, {method}: {found}", markup=False, soft_wrap=True)
    return row


def _votes_of(recipe: Recipe, images: int) -> Recipe:
    """Without the values of k that are more than there are images to train on."""
    method = recipe.sweep.grid.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("k"), list):
        return recipe
    fitting = [k for k in method["k"] if not isinstance(k, int) or k <= images] or [1]
    return recipe.changed("sweep", grid=recipe.sweep.grid | {"method": method | {"k": fitting}})


def _row(backbone: str, **known: Any) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS) | {"backbone": backbone} | known


def _ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Backbones by their best accuracy on val, failed ones last; a tie keeps the order in which they were named."""
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    best = {name: max(row["val_top1"] or -1.0 for row in rows if row["backbone"] == name) for name in names}
    widths = {row["backbone"]: row["width"] for row in rows if row["width"]}
    order = sorted(names, key=lambda name: -best[name])
    ranks = {name: rank if best[name] >= 0 else None for rank, name in enumerate(order, 1)}
    kept = sorted(rows, key=lambda row: order.index(row["backbone"]))
    return [row | {"rank": ranks[row["backbone"]], "width": widths.get(row["backbone"])} for row in kept]


def _refuse_other(folder: Path, made_of: dict[str, Any]) -> None:
    """Raises UserError where ``--out`` holds anything but a probe of the same data; begins one where it is empty."""
    file = folder / "probe.json"
    try:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if found and not file.is_file():
            raise UserError(f"--out {folder}: holds files ({', '.join(found[:3])}) but no probe; name a new folder")
        if found:
            before = read_json(file).get("made_of")
            if before != json.loads(to_json(made_of)):
                raise UserError(f"--out {folder}: holds a probe of other data or settings; name a new folder")
            return
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be used ({error.strerror}); name another folder") from error
    _write(folder, made_of, [])


def _write(folder: Path, made_of: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        cells = [json.dumps(cell) if isinstance(cell, dict) else cell for cell in (row[name] for name in COLUMNS)]
        writer.writerow(cells)
    with raising_disk_full("the table", folder, "the same command continues"):
        write_atomically(folder / "probe.csv", text.getvalue())
        write_atomically(folder / "probe.json", to_json({"made_of": made_of, "rows": list(rows)}, indent=1) + "\n")


def _show(rows: Sequence[dict[str, Any]], folder: Path, console: Console) -> None:
    table = Table(title="top-1, %: val / test, each method at its best on val")
    for column in ("rank", "backbone", "width", *METHODS, "seconds"):
        table.add_column(column, justify="left" if column == "backbone" else "right", overflow="fold")
    for name in dict.fromkeys(row["backbone"] for row in rows):
        own = {row["method"]: row for row in rows if row["backbone"] == name}
        first = next(iter(own.values()))
        if first["failed"]:
            table.add_row("-", name, "-", *("-" for _ in METHODS), "-")
            continue
        shown = (f"{own[method]['val_top1']:.1f} / {own[method]['test_top1']:.1f}" for method in METHODS)
        seconds = sum(row["seconds"] for row in own.values())
        table.add_row(str(first["rank"]), name, str(first["width"]), *shown, f"{seconds:.1f}")
    console.print(table)
    for row in rows:
        if row["failed"]:
            console.print(f"{row['backbone']}: {row['failed']}", markup=False, soft_wrap=True)
    console.print(str(folder / "probe.csv"), markup=False, soft_wrap=True)

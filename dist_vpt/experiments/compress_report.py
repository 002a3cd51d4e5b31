"""The curve of a compression: accuracy against the share of features kept."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.experiments.compress_fractions import Fraction, FractionOf, changes
from dist_vpt.files import read_json, to_json, write_atomically


def conclude(out: Path, fractions: Sequence[Fraction], fraction_of: FractionOf, console: Console) -> dict[str, Any]:
    """Write and print the curve through these fractions and those of the same compression that were made before."""
    mode, every = fractions[0].made_of["mode"], {fraction.keep: fraction for fraction in fractions}
    for file in out.glob(f"{mode}-*/result.json"):
        keep = read_json(file).get("compression", {}).get("keep")
        if keep is not None and keep not in every:
            found = fraction_of(keep)
            done = found.folder.result == file and found.folder.status().get("status") == "done"
            if done and not changes(found):
                every[keep] = found
    runs = [(str(one.folder.path), read_json(one.folder.result)) for _, one in sorted(every.items(), reverse=True)]
    uncompressed = runs[0][1]["compression"]["uncompressed"]
    curve = {
        **fractions[0].made_of,
        "split": uncompressed["split"],
        "uncompressed": uncompressed,
        "points": [
            {
                **{key: result["compression"][key] for key in ("keep", "features", "bytes")},
                **result["last"][uncompressed["split"]],
                "run": path,
            }
            for path, result in runs
        ],
    }
    picture = io.BytesIO()
    curve_figure(curve).savefig(picture, format="png", dpi=120)
    write_atomically(out / f"{mode}-curve.png", picture.getvalue())
    write_atomically(out / f"{mode}-curve.json", to_json(curve, indent=1) + "\n")
    _print(curve, console)
    console.print(str(out / f"{mode}-curve.json"), markup=False, soft_wrap=True)
    return curve


def curve_figure(curve: dict[str, Any]) -> Any:
    """Accuracy against the share of features kept, beside the uncompressed run's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, points = figure.subplots(), curve["points"]
    axes.plot([100 * p["keep"] for p in points], [p["top1"] for p in points], "o-", label=curve["mode"])
    axes.axhline(curve["uncompressed"]["top1"], linestyle="--", color="gray", label="uncompressed")
    axes.set(xlabel="features kept (%)", ylabel=f"{curve['split']} top-1 (%)", title=f"{curve['mode']} of a VQT head")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _print(curve: dict[str, Any], console: Console) -> None:
    whole = curve["uncompressed"]
    table = Table(title=f"{curve['mode']}: {curve['split']} top-1 by the share of features kept")
    for column in ("kept", "features", "size, KiB", "size, %", "top-1, %", "difference"):
        table.add_column(column, justify="right")
    table.add_row(
        "uncompressed", f"{whole['features']:,}", f"{whole['bytes'] / 1024:.1f}", "", f"{whole['top1']:.2f}", ""
    )
    for point in curve["points"]:
        table.add_row(
            str(point["keep"]),
            f"{point['features']:,}",
            f"{point['bytes'] / 1024:.1f}",
            f"{100 * point['bytes'] / whole['bytes']:.0f}",
            f"{point['top1']:.2f}",
            f"{point['top1'] - whole['top1']:+.2f}",
        )
    console.print(table)

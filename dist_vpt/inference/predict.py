"""``dist-vpt predict``: image files classified with a run's adapters, as CSV or JSON."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vpt.errors import UserError
from dist_vpt.files import write_atomically
from dist_vpt.inference.load import temperature_of
from dist_vpt.inference.saved import load


def predict(
    run: str,
    images: Sequence[str],
    adapters: str = "last",
    top: int | None = None,
    out: str | None = None,
    *,
    calibrated: bool = False,
    weights: str | None = None,
) -> list[dict[str, Any]]:
    """Classify image files: for each, class names and probabilities, the most likely first; as CSV or JSON.

    ``run``: a run folder, ``hub:user/name``, or a file of ``dist-vpt export --format safetensors``. ``top``: so many
    classes an image; None: 5, or of several labels an image all that reach their thresholds. ``calibrated``: logits are
    divided by the run's temperature.
    """
    if top is not None and top < 1:
        raise UserError(f"--top {top}: must be at least 1")
    if out and Path(out).suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: must end in .csv or .json")
    if out and not Path(out).parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}; create it first")
    if out and (Path(out).is_dir() or not os.access(Path(out).parent, os.W_OK)):
        raise UserError(f"--out {out}: cannot be written; name another file")
    temperature = temperature_of(run, adapters) if calibrated else 1.0
    rows = load(run, adapters, weights=weights).predict(images, top, temperature)
    try:
        _write(rows, out)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(
            f"{f'--out {out}' if out else 'the output'}: cannot be written ({error.strerror}); name another file"
        ) from error
    return rows


def _write(rows: list[dict[str, Any]], out: str | None) -> None:
    if out and out.endswith(".json"):
        write_atomically(Path(out), json.dumps(rows, indent=1) + "\n")
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for row in rows:
        if not row["predictions"]:
            writer.writerow([row["image"], "", "(no label)", ""])
        for rank, prediction in enumerate(row["predictions"], 1):
            writer.writerow([row["image"], rank, prediction["class"], prediction["probability"]])
    if out:
        write_atomically(Path(out), text.getvalue())
    else:
        sys.stdout.write(text.getvalue())

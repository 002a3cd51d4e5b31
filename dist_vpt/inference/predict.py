"""Classifying image files with a run's adapters.

B batch, K classes.
"""

import csv
import io
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vpt.data.formats.files import find_images, passed_over
from dist_vpt.errors import UserError
from dist_vpt.files import printable, write_atomically
from dist_vpt.inference.load import load_run, temperature_of
from dist_vpt.inference.named_classes import named_classes


def predict(
    run: str,
    images: Sequence[str],
    adapters: str = "last",
    top: int | None = None,
    out: str | None = None,
    *,
    calibrated: bool = False,
) -> list[dict[str, Any]]:
    """Classify image files: for each, class names and probabilities, the most likely first; as CSV or JSON.

    ``top``: so many classes an image; None: 5, or of several labels an image all that reach their thresholds.
    ``calibrated``: logits are divided by the run's temperature.
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
    loaded, files = load_run(run, adapters), image_files(images)
    classes, size = loaded.classes, loaded.recipe.train.eval_batch_size
    rows = []
    for start in range(0, len(files), size):
        chunk = files[start : start + size]
        for file, row in zip(chunk, loaded.probabilities(loaded.load_images(chunk), temperature), strict=True):
            rows.append({"image": printable(file), "predictions": named_classes(row, classes, top, loaded.thresholds)})
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


def image_files(images: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for image in map(Path, images):
        try:
            found = stat.S_IFMT(os.stat(image).st_mode)
        except OSError as error:
            reason = "no such file or folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"{printable(image)}: {reason}") from error
        if found == stat.S_IFDIR:
            inside, others = find_images(image)
            line = passed_over(others, image)
            if not inside:
                raise UserError(line or f"{image}: holds no image; name a folder of images, or image files")
            if line:
                print(f"note: {line}", file=sys.stderr)
            files += inside
        elif found == stat.S_IFREG:
            files.append(image)
        else:
            raise UserError(f"{printable(image)}: neither a file nor a folder")
    return files

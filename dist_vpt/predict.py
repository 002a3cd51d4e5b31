"""What a run's adapters are good for: scoring a split again, classifying images, and merging into plain weights.

B batch, K classes.
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dist_vpt.backbones.build import describe, plain
from dist_vpt.build import assemble, channels, make_method, make_view
from dist_vpt.checkpoint import read_adapters, restore, write_adapters
from dist_vpt.data import resolve
from dist_vpt.data.image_folder import EXTENSIONS
from dist_vpt.data.images import decode
from dist_vpt.data.transforms import View
from dist_vpt.engine import evaluate
from dist_vpt.errors import UserError, WeightsError
from dist_vpt.methods.base import Method
from dist_vpt.recipe import Recipe
from dist_vpt.runfolder import RunFolder, read_json, write_atomically
from dist_vpt.strategy import make_accelerator


def score(run: str, split: str, adapters: str, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Score a split with a run's adapters, print it beside the number reported at the end of the run, return it."""
    folder = RunFolder(run)
    folder.refuse_sweep()
    recipe = folder.load(overrides)
    parts = assemble(recipe)
    path = folder.best if adapters == "best" else folder.adapters
    tensors, facts = read_adapters(path)
    restore(parts.method, tensors, path)
    if list(parts.splits.classes) != _classes(facts, path):
        raise UserError(f"{run}: was trained on other classes than {recipe.data.task} has here; mend data.root")
    accelerator = make_accelerator(recipe)
    model = accelerator.prepare_model(parts.method, evaluation_mode=True)
    batches = parts.evaluation(split, accelerator.process_index, accelerator.num_processes)
    scores = evaluate(accelerator, model, batches, len(parts.splits.classes)).compute()
    batches.close()
    if accelerator.is_main_process:
        reported = _reported(folder, adapters).get(split, {})
        table = Table(title=f"{run}: {split} split, {adapters} adapters, {len(parts.splits[split]):,} images")
        for column in ("score", "now", "reported by the run"):
            table.add_column(column, justify="left" if column == "score" else "right")
        for name, value in scores.items():
            table.add_row(name, f"{value:.4f}", f"{reported[name]:.4f}" if name in reported else "-")
        Console().print(table)
    accelerator.end_training()
    return scores


@dataclass(frozen=True)
class OpenRun:
    """A run's method with its adapters, on its device and ready to score."""

    recipe: Recipe
    method: Method
    classes: list[str]
    device: torch.device
    view: View

    def show(self, file: Path) -> Tensor:
        """An image file as the method is shown it, [3, S, S]."""
        upright = resolve(self.recipe.data).upright
        return self.view.eval(decode(file, str(file), self.recipe.data.max_megapixels, upright=upright))


def open_run(run: str, adapters: str, **runtime: Any) -> OpenRun:
    """``adapters``: last or best; ``runtime``: keys of the recipe's runtime that are to be others."""
    folder = RunFolder(run)
    folder.refuse_sweep()
    path = folder.best if adapters == "best" else folder.adapters
    recipe = folder.load()
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update=runtime)})
    tensors, facts = read_adapters(path)
    classes = _classes(facts, path)
    wants = describe(recipe.backbone)
    method, _ = make_method(recipe, wants, len(classes))
    restore(method, tensors, path)
    device = _device(recipe)
    return OpenRun(recipe, method.to(device).eval(), classes, device, make_view(recipe.data, wants))


def predict(
    run: str, images: Sequence[str], adapters: str = "last", top: int = 5, out: str | None = None
) -> list[dict[str, Any]]:
    """Classify image files: for each, class names and probabilities, the likeliest first; as CSV or JSON."""
    if top < 1:
        raise UserError(f"--top {top}: must be at least 1")
    if out and Path(out).suffix not in (".csv", ".json"):
        raise UserError(f"--out {out}: must end in .csv or .json")
    if out and not Path(out).parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}; make it first")
    opened, files = open_run(run, adapters), image_files(images)
    classes, size = opened.classes, opened.recipe.train.eval_batch_size
    rows = []
    for start in range(0, len(files), size):
        some = files[start : start + size]
        batch = torch.stack([opened.show(file) for file in some])
        with torch.no_grad():
            probabilities_BK = opened.method(batch.to(opened.device)).float().softmax(1).cpu()
        for file, row in zip(some, probabilities_BK, strict=True):
            values, indices = row.topk(min(top, len(classes)))
            best = [(classes[i], v) for i, v in zip(indices.tolist(), values.tolist(), strict=True)]
            rows.append(
                {
                    "image": str(file),
                    "predictions": [{"class": c, "probability": round(p, 6)} for c, p in best],
                }
            )
    _write(rows, out)
    return rows


def merge(run: str, out: str, adapters: str = "last") -> None:
    """Write the backbone's float32 weights with a run's adapters folded in, and the head, under timm's names.

    The file's head and what is printed say how timm makes the model, and the head how the run was shown images.

    Raises UserError for a method that no plain timm model can stand for.
    """
    if Path(out).suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    if not Path(out).parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}; make it first")
    folder = RunFolder(run)
    folder.refuse_sweep()
    path = folder.best if adapters == "best" else folder.adapters
    recipe = folder.load(["runtime.precision=fp32"])
    if recipe.runtime.frozen_weights == "int8":
        raise UserError(
            f"{run}: runtime.frozen_weights = int8: merged weights, which are whole, would not give what the run gave; "
            "train it with runtime.frozen_weights=precision"
        )
    tensors, facts = read_adapters(path)
    classes, wants = _classes(facts, path), describe(recipe.backbone)
    method, _ = make_method(recipe, wants, len(classes))
    restore(method, tensors, path)
    size, (mean, std) = recipe.data.image_size or wants.image_size, channels(recipe.data, wants)
    view, model = make_view(recipe.data, wants), plain(recipe.backbone, size, len(classes))
    shown = {"image_size": size, "mean": mean, "std": std, "resize": view.resize, "fit": view.fit}
    made = {"architecture": model.architecture, "options": model.options, "pool": model.pool}
    facts = {"backbone": recipe.backbone.name, "classes": classes, **made, **shown}
    write_adapters(Path(out), timm_tensors(method), facts)
    print(f"{out}: weights for\n{model}")


def timm_tensors(method: Method) -> dict[str, Tensor]:
    """All tensors of the plain timm model that gives what the method gives. Raises UserError where there is none."""
    called = method.backbone.timm_name
    tensors = {called(name): tensor for name, tensor in method.backbone.state_dict().items()}
    tensors |= method.merged()
    tensors |= {called(f"head.{name}"): tensor for name, tensor in method.head.state_dict().items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _write(rows: list[dict[str, Any]], out: str | None) -> None:
    if out and out.endswith(".json"):
        write_atomically(Path(out), json.dumps(rows, indent=1) + "\n")
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "probability"])
    for row in rows:
        for rank, prediction in enumerate(row["predictions"], 1):
            writer.writerow([row["image"], rank, prediction["class"], prediction["probability"]])
    if out:
        write_atomically(Path(out), text.getvalue())
    else:
        sys.stdout.write(text.getvalue())


def image_files(images: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for image in map(Path, images):
        if image.is_dir():
            inside = sorted(p for p in image.rglob("[!.]*") if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise UserError(f"{image}: no images in this folder ({', '.join(sorted(EXTENSIONS))})")
            files += inside
        elif image.is_file():
            files.append(image)
        else:
            raise UserError(f"{image}: no such file or folder")
    return files


def _classes(facts: dict[str, Any], path: Path) -> list[str]:
    if "classes" not in facts:
        raise WeightsError(f"{path}: names no classes, so that a run did not write it; restore the run's own file")
    return facts["classes"]


def _device(recipe: Recipe) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator if accelerator is not None and recipe.runtime.device == "auto" else torch.device("cpu")


def _reported(folder: RunFolder, adapters: str) -> dict[str, Any]:
    if not folder.result.is_file():
        return {}
    return read_json(folder.result)[adapters] or {}

"""``dist-vpt export``: a run as one file for other programs.

B images of a batch, S side of an image, K classes.

- ``torch``: a program of torch.export (.pt2). ``onnx``: an ONNX model. Both give logits [B, K] in float32, without this
  package, whatever the method and whatever kernels, precision and compiler the run was trained with.
- ``safetensors``: weights alone: with ``merge`` those of a plain timm model, else backbone and adapters
  (exported_weights.py).

Whatever is written is read again and run before it gets its name: its logits must equal the run's.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dist_vpt.backbones.build import timm_model
from dist_vpt.errors import UserError
from dist_vpt.files import raising_disk_full, sync
from dist_vpt.inference import export_onnx, export_torch
from dist_vpt.inference.export_check import logits_of, make_check
from dist_vpt.inference.export_facts import describe, input_names
from dist_vpt.inference.export_preprocessing import ExportedModel, take_normalized
from dist_vpt.inference.exported_weights import CONTENTS, load_export, own_tensors
from dist_vpt.inference.hub import adapters_file, open_run
from dist_vpt.inference.load import check_backbones, classes_of
from dist_vpt.inference.merge import plain_method, refuse_unmergeable, timm_tensors
from dist_vpt.inference.named_classes import thresholds_of
from dist_vpt.inference.tuned import Tuned
from dist_vpt.recipe.schema import Recipe
from dist_vpt.recipe.sharing import shared_recipe, with_weights
from dist_vpt.runs.adapters import read_adapters, restore, write_adapters
from dist_vpt.runtime.int8 import require_torchao
from dist_vpt.training.components import attach_method, build_backbone
from dist_vpt.training.inputs import resolve_inputs

Format = Literal["torch", "onnx", "safetensors"]
Inside = Literal["none", "normalize", "resize"]
SUFFIXES: dict[str, Format] = {".pt2": "torch", ".onnx": "onnx", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class ExportOptions:
    """How a run is exported."""

    format: Format
    merge: bool = False  # fold adapters into plain weights first
    dynamic_batch: bool = False  # any number of images at once; else one
    quantize: Literal["none", "int8"] = "none"
    preprocessing: Inside = "normalize"  # what of it is inside the file


def export(run: str, out: str, options: ExportOptions, adapters: str = "last", weights: str | None = None) -> None:
    """Write a run as one file, and print what it holds.

    ``run``: a folder or ``hub:user/name``. ``weights``: the file of the backbone's weights, where they are not where
    the recipe has them.

    Raises UserError, with nothing written, for what cannot be exported, packages that are missing, and a file whose
    logits would differ from the run's.
    """
    file = Path(out)
    _check_options(file, options)
    loaded, of_backbone = _load(run, adapters, weights, options)
    timm_weights = options.format == "safetensors" and options.merge
    inside = "none" if timm_weights else options.preprocessing  # a timm model takes normalized images
    facts = describe(loaded, inside, options.quantize, adapters)
    with raising_disk_full("the export", file.parent, "start again"), _renamed_at_the_end(file) as temporary:
        if options.format == "safetensors":
            text = _write_weights(temporary, loaded, of_backbone, facts, merge=options.merge)
        else:
            text = _write_program(run, temporary, loaded, facts, options)
    print(f"{out}: {text}")
    if (views := loaded.recipe.data.test_crops) > 1:
        print(f"note: the run averages {views} views of each image (data.test_crops), and this file takes one of them")


def format_of(out: str, format: Format | None) -> Format:
    """The format that was asked for, or the one of the file's ending. Raises UserError where the two differ."""
    suffix = Path(out).suffix
    if format is None:
        if suffix not in SUFFIXES:
            raise UserError(
                f"--out {out}: must end in {', '.join(SUFFIXES)}; rename it, or add --format peft for a folder of PEFT"
            )
        return SUFFIXES[suffix]
    wanted = next(known for known, of in SUFFIXES.items() if of == format)
    if suffix != wanted:
        raise UserError(f"--out {out}: must end in {wanted}, for --format {format}; rename it")
    return format


def _check_options(file: Path, options: ExportOptions) -> None:
    """Raises UserError for options that exclude each other, a place that cannot be written, and missing packages."""
    format_of(str(file), options.format)
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent}; create it first")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"--out {file}: cannot be written; name another file")
    if options.format == "onnx":
        export_onnx.check_packages()
        return
    if options.format == "torch":
        if options.quantize == "int8":
            require_torchao("--quantize int8", "leave it out")
        return
    given = {
        "--dynamic-batch": options.dynamic_batch,
        "--quantize int8": options.quantize != "none",
        f"--preprocessing {options.preprocessing}": options.preprocessing != "normalize",
    }
    for option in (name for name, is_given in given.items() if is_given):
        raise UserError(
            f"{option}: a .safetensors file holds float32 weights and no computation; leave it out, or use --format "
            "onnx or torch"
        )


def _load(run: str, adapters: str, weights: str | None, options: ExportOptions) -> tuple[Tuned, dict[str, Tensor]]:
    """The run in float32 with plain kernels on the CPU, and the backbone's tensors before the method was attached."""
    folder = open_run(run)
    path = adapters_file(folder, adapters)
    recipe = with_weights(folder.load(), weights, run)
    if recipe.runtime.quantize == "int8":
        raise UserError(
            f"{run}: runtime.quantize = int8: exported weights are those of the backbone's file, not quantized, and "
            "would give other outputs; train it with runtime.quantize=none"
        )
    _refuse_settings(recipe, options)
    plain: dict[str, Any] = {"attention": "sdpa", "activation_checkpointing": "none", "compile": False}
    recipe = recipe.changed("runtime", precision="fp32", device="cpu", offload=False, **plain)
    tensors, facts = read_adapters(path)
    classes = classes_of(facts, path)
    check_backbones(recipe, facts, path)
    inputs = resolve_inputs(recipe).one_view()
    backbone, _ = build_backbone(recipe, inputs)
    of_backbone = backbone.state_dict()
    method = attach_method(recipe, backbone, len(classes))
    restore(method, tensors, path)
    return Tuned(recipe, method, classes, inputs, thresholds_of(recipe, facts, classes)), of_backbone


def _refuse_settings(recipe: Recipe, options: ExportOptions) -> None:
    if options.merge:
        refuse_unmergeable(recipe)
    if options.preprocessing == "none" and getattr(recipe.method, "location", None) == "pad":
        raise UserError(
            "--preprocessing none: method.location = pad puts a frame of pixels around the image, which is normalized "
            "with it; use --preprocessing normalize or resize"
        )


def _write_weights(
    file: Path, loaded: Tuned, of_backbone: dict[str, Tensor], facts: dict[str, Any], *, merge: bool
) -> str:
    """Write a .safetensors file; returns a text about it."""
    check = make_check(loaded, "normalize", (1,))
    if not merge:
        recipe = loaded.recipe.changed("runtime", device="auto", attention="auto", compile=None)  # of who loads it
        content = shared_recipe(recipe).model_dump(mode="json")  # without the paths of this machine
        tensors = own_tensors(loaded.method, of_backbone)
        write_adapters(file, tensors, facts | {"contents": CONTENTS, "recipe": content})
        again = load_export(file)
        found = check.compare(lambda arrays: logits_of(again.method, arrays))
        return f"backbone, adapters and recipe, {_mib(file)}; {found}; dist-vpt predict takes it in place of a run"
    size = loaded.inputs.transform.image_size
    tensors = timm_tensors(loaded.method)
    plain = plain_method(loaded, tensors)
    check.compare(lambda arrays: logits_of(plain, arrays))
    model = timm_model(loaded.recipe.backbone, size, len(loaded.classes))
    made = {"architecture": model.architecture, "options": model.options, "pool": model.pool}
    write_adapters(file, tensors, facts | {"contents": "timm weights", **made})
    return f"weights for\n{model}"


def _write_program(run: str, file: Path, loaded: Tuned, facts: dict[str, Any], options: ExportOptions) -> str:
    """Write a .pt2 or .onnx file; returns a text about it."""
    check = make_check(loaded, options.preprocessing, (1, 7) if options.dynamic_batch else (1,))
    method = loaded.method
    if options.merge:
        method = plain_method(loaded, timm_tensors(loaded.method))
    if options.preprocessing == "none":
        take_normalized(method)
    model = ExportedModel(method, loaded.inputs.transforms if options.preprocessing == "resize" else ())
    if options.format == "torch" and options.quantize == "int8":
        export_torch.hold_in_int8(method.backbone)
    names = input_names(loaded, options.preprocessing)
    with _quiet(), torch.no_grad():
        try:
            program = export_torch.record(model, check.example, names, dynamic_batch=options.dynamic_batch)
            write = export_onnx.write if options.format == "onnx" else export_torch.write
            return write(file, program, facts, check, quantize=options.quantize == "int8")
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:  # of recording, of the exporter or of the runtime: any kind
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{run}: method.name = {loaded.recipe.method.name} on {loaded.recipe.backbone_name} cannot be exported "
                f"as {options.format} ({type(error).__name__}: {reason}); use --format safetensors, which records no "
                "computation"
            ) from error


def _mib(file: Path) -> str:
    return f"{file.stat().st_size / 2**20:,.1f} MiB"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of exporters, which are about their own passes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


@contextmanager
def _renamed_at_the_end(file: Path) -> Iterator[Path]:
    """A temporary file beside ``file`` that gets its name, with what was written beside it, where nothing is raised."""
    folder = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    folder.mkdir()
    try:
        yield folder / file.name
        others = sorted(path for path in folder.iterdir() if path.name != file.name)
        for written in (*others, folder / file.name):  # weights before the graph that names them
            sync(written)
            os.replace(written, file.with_name(written.name))
        sync(file.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""``dist_vpt.export``: a run as a file, or a folder, for other programs."""

from pathlib import Path
from typing import Any, Literal

from dist_vpt.errors import UserError
from dist_vpt.inference.export import ExportOptions, Inside, format_of
from dist_vpt.inference.export import export as write_export
from dist_vpt.inference.peft_layout import write_peft


def export(
    run: Any,
    out: str | Path,
    *,
    format: Literal["torch", "onnx", "safetensors", "peft"] | None = None,
    merge: bool = False,
    dynamic_batch: bool = False,
    preprocessing: Inside = "normalize",
    quantize: Literal["none", "int8"] = "none",
    adapters: str = "last",
    weights: str | None = None,
) -> Path:
    """Write a run for other programs, as ``dist-vpt export`` does; returns where.

    Args:
        run: its folder, what ``dist_vpt.train`` returned, or ``hub:user/name``.
        out: a file that ends in .onnx, .pt2 or .safetensors; of ``peft`` a new folder.
        format: by default that of the ending of ``out``.
        merge: fold the adapters into plain weights first.
        dynamic_batch: any number of images at once; else one.
        preprocessing: what of it is in the file.
        quantize: ``int8``: hold matrices in 8 bits.
        adapters: ``last`` or ``best``.
        weights: the file of the backbone's weights, where they are not where the run had them.

    Raises:
        UserError: with nothing written, for what cannot be exported.
    """
    folder, file = str(getattr(run, "path", run)), str(out)
    if format != "peft":
        options = ExportOptions(format_of(file, format), merge, dynamic_batch, quantize, preprocessing)
        write_export(folder, file, options, adapters, weights)
        return Path(file)
    given = {
        "--merge": merge,
        "--dynamic-batch": dynamic_batch,
        f"--preprocessing {preprocessing}": preprocessing != "normalize",
        f"--quantize {quantize}": quantize != "none",
        "--weights": weights is not None,
    }
    for option in (name for name, is_given in given.items() if is_given):
        raise UserError(f"{option}: PEFT's files hold the adapters alone; leave it out")
    written = write_peft(folder, file, adapters)
    print(written)
    return written

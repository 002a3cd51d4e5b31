"""Adapters merged into plain timm weights."""

from pathlib import Path

from torch import Tensor

from dist_vpt.backbones.build import timm_model
from dist_vpt.errors import UserError
from dist_vpt.inference.hub import adapters_file, open_run
from dist_vpt.inference.load import classes_of, refuse_several
from dist_vpt.methods.base import Method
from dist_vpt.recipe.sharing import with_weights
from dist_vpt.runs.adapters import read_adapters, restore, write_adapters
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs


def merge(run: str, out: str, adapters: str = "last", weights: str | None = None) -> None:
    """Write the backbone's float32 weights with a run's adapters folded in, and the head, under timm's names.

    The file's metadata and the printed lines say how to create the timm model; the metadata also holds the
    preprocessing. ``run``: a folder or ``hub:user/name``; ``weights``: the file of the backbone's weights, where they
    are not where the recipe has them. Raises UserError for a method that no plain timm model can express.
    """
    if Path(out).suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    if not Path(out).parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {Path(out).parent}; create it first")
    folder = open_run(run)
    path = adapters_file(folder, adapters)
    recipe = with_weights(folder.load(["runtime.precision=fp32"]), weights, run)
    refuse_several(recipe, "merge")
    if recipe.runtime.quantize == "int8":
        raise UserError(
            f"{run}: runtime.quantize = int8: merged weights are not quantized and would give other outputs; "
            "train it with runtime.quantize=none"
        )
    tensors, facts = read_adapters(path)
    classes, inputs = classes_of(facts, path), resolve_inputs(recipe)
    method, _ = build_method(recipe, inputs, len(classes))
    restore(method, tensors, path)
    transform = inputs.transform
    model = timm_model(recipe.backbone, transform.image_size, len(classes))
    shown = {
        "image_size": transform.image_size,
        "mean": inputs.mean,
        "std": inputs.std,
        "resize": transform.interpolation,
        "fit": transform.crop_mode,
    }
    made = {"architecture": model.architecture, "options": model.options, "pool": model.pool}
    facts = {"backbone": recipe.backbone.name, "classes": classes, **made, **shown}
    write_adapters(Path(out), timm_tensors(method), facts)
    print(f"{out}: weights for\n{model}")


def timm_tensors(method: Method) -> dict[str, Tensor]:
    """All tensors of the plain timm model with equal outputs. Raises UserError if there is none."""
    timm_name = method.backbone.timm_name
    tensors = {timm_name(name): tensor for name, tensor in method.backbone.state_dict().items()}
    tensors |= method.merged()
    tensors |= {timm_name(f"head.{name}"): tensor for name, tensor in method.plain_head().items()}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

"""Adapters merged into plain timm weights."""

from pathlib import Path

from torch import Tensor

from dist_vpt.backbones.build import plain
from dist_vpt.errors import UserError
from dist_vpt.inference.load import classes_of
from dist_vpt.methods.base import Method
from dist_vpt.runs.adapters import read_adapters, restore, write_adapters
from dist_vpt.runs.folder import RunFolder
from dist_vpt.training.components import build_method, resolve_inputs


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
    if recipe.runtime.quantize == "int8":
        raise UserError(
            f"{run}: runtime.quantize = int8: merged weights, which are whole, would not give what the run gave; "
            "train it with runtime.quantize=none"
        )
    tensors, facts = read_adapters(path)
    classes, inputs = classes_of(facts, path), resolve_inputs(recipe.data, recipe.backbone)
    method, _ = build_method(recipe, inputs, len(classes))
    restore(method, tensors, path)
    view, size = inputs.view, inputs.view.image_size
    model = plain(recipe.backbone, size, len(classes))
    shown = {
        "image_size": size,
        "mean": inputs.mean,
        "std": inputs.std,
        "resize": view.interpolation,
        "fit": view.crop_mode,
    }
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

"""Weight files: read without executing anything, loaded with the difference proven."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from dist_vpt.errors import WeightsError

CLASSIFIER = ("head.", "head_dist.", "fc.", "pre_logits.")  # what a tuned model brings its own of
SHOWN = 8  # names of a difference that a message lists


@dataclass(frozen=True)
class Difference:
    """How a file's tensors differ from the model's, after timm's own conversions."""

    missing: tuple[str, ...] = ()  # in the model, not in the file
    unexpected: tuple[str, ...] = ()  # in the file, not in the model
    mismatched: tuple[str, ...] = ()  # "name: file (shape), model (shape)"
    classifier: tuple[str, ...] = ()  # the file's own classifier, left out on purpose

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = []
        for title, names in (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {len(names)} {title}: {', '.join(names[:SHOWN])}{more}")
        return "\n".join(lines)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors, .npz or torch file of tensors. No pickle is ever executed.

    Raises WeightsError for a missing, damaged or foreign file.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file; give backbone.weights an existing .safetensors, .pth or .npz"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        return _tensors_of(torch.load(path, map_location="cpu", weights_only=True), path)
    except WeightsError:
        raise
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file ({error}); download it again") from error
    except Exception as error:  # torch, pickle, zip and NumPy raise a dozen types for a file that is not theirs
        # Torch's own words on a pickle advise to load it all the same: they are left out.
        reason = "a pickle" if isinstance(error, UnpicklingError) else str(error).split("\n")[0] or type(error).__name__
        raise WeightsError(
            f"{path}: not a file of plain tensors ({reason}). "
            "Pickled objects are never executed: convert the weights to .safetensors where you trust them"
        ) from error


def _tensors_of(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path}: holds no mapping of names to tensors (at most below 'model' or 'state_dict')")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def load_into(vit: VisionTransformer, path: Path, *, lenient: bool) -> Difference:
    """Load a file into a timm ViT, resampling its position embedding to the model's grid.

    Strict: raises WeightsError unless the two sets of tensors are equal (a classifier in the file is left out).
    Lenient: returns the difference, after checking that all the rest is bit-equal to the file's.
    """
    tensors = read_tensors(path)
    if path.suffix == ".npz":
        return _load_npz(vit, path, tensors)
    try:
        converted = checkpoint_filter_fn(tensors, vit)
    except Exception as error:  # timm assumes its own layouts; whatever breaks is a foreign one
        raise WeightsError(f"{path}: not weights of this architecture (timm cannot convert them: {error})") from error
    own = vit.state_dict()
    classifier = tuple(sorted(n for n in converted if n.startswith(CLASSIFIER) and n not in own))
    offered = {n: t for n, t in converted.items() if n not in classifier}
    shared = own.keys() & offered.keys()
    mismatched = {n for n in shared if own[n].shape != offered[n].shape}
    kernel, patches = "patch_embed.proj.weight", tensors.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 4 and patches.shape[2:] != own[kernel].shape[2:]:
        mismatched.add(kernel)  # timm has resampled it, but patches of another size are another architecture
        offered[kernel] = patches
    difference = Difference(
        missing=tuple(sorted(own.keys() - offered.keys())),
        unexpected=tuple(sorted(offered.keys() - own.keys())),
        mismatched=tuple(
            f"{n}: file {tuple(offered[n].shape)}, model {tuple(own[n].shape)}" for n in sorted(mismatched)
        ),
        classifier=classifier,
    )
    loadable = {n: offered[n] for n in sorted(shared - mismatched)}
    if difference and (not lenient or not loadable):
        fix = "name the architecture they are of in backbone.name" + (
            "" if lenient else ", or use backbone.load=lenient"
        )
        raise WeightsError(f"{path}: not weights of this architecture ({fix}):\n{difference}")
    result = vit.load_state_dict(loadable, strict=False)
    _prove(vit, loadable, set(result.missing_keys), own.keys() - loadable.keys(), path)
    return difference


def _load_npz(vit: VisionTransformer, path: Path, tensors: dict[str, Tensor]) -> Difference:
    """JAX weights through timm's own loader; proven by filling the model with NaN first."""
    if "embedding/kernel" not in tensors:
        raise WeightsError(
            f"{path}: not a JAX vision transformer (no 'embedding/kernel' among its {len(tensors)} arrays)"
        )
    patch, own_patch = tuple(tensors["embedding/kernel"].shape[:2]), tuple(vit.patch_embed.proj.weight.shape[2:])
    if patch != own_patch:  # timm would resample them
        raise WeightsError(
            f"{path}: not weights of this architecture: its patches are of {patch} pixels, not of {own_patch}; "
            "mend backbone.name"
        )
    with torch.no_grad():
        for tensor in vit.state_dict().values():
            tensor.fill_(float("nan"))
    try:
        vit.load_pretrained(str(path))
    except Exception as error:  # KeyError, shape errors and asserts, all of them for another architecture
        raise WeightsError(f"{path}: not weights of this architecture: {type(error).__name__}: {error}") from error
    missing = tuple(sorted(n for n, t in vit.state_dict().items() if not torch.isfinite(t).all()))
    if missing:
        raise WeightsError(f"{path}: not weights of this architecture:\n{Difference(missing=missing)}")
    blocks = {name.split("/")[1] for name in tensors if name.startswith("Transformer/encoderblock_")}
    if len(blocks) != len(vit.blocks):
        raise WeightsError(
            f"{path}: not weights of this architecture: {len(blocks)} blocks, not {len(vit.blocks)}; mend backbone.name"
        )
    return Difference()


def _prove(
    vit: VisionTransformer, loaded: dict[str, Tensor], missing: set[str], expected: set[str], path: Path
) -> None:
    if missing != expected:
        raise WeightsError(f"{path}: torch reports {sorted(missing)} as missing, the comparison {sorted(expected)}")
    own = vit.state_dict()
    for name, tensor in loaded.items():
        if not torch.equal(own[name], tensor.to(own[name].dtype)):
            raise WeightsError(f"{path}: {name} differs from the file after loading")

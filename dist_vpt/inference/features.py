"""``dist-vpt features``: what a frozen backbone computes for the images of a dataset, in files for other programs.

B images of a batch, N tokens, D width, L blocks.

    OUT/SPLIT-00000.safetensors    or .parquet: features, labels and paths of some images, in the split's order
    OUT/features.json              what they were made of, and the files; written last
"""

import hashlib
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dist_vpt import __version__
from dist_vpt.backbones.swin import SwinBackbone
from dist_vpt.backbones.vit import Backbone
from dist_vpt.data.workers import PADDING
from dist_vpt.distributed.devices import select_device
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError
from dist_vpt.files import new_folder, raising_disk_full, to_json, write_atomically
from dist_vpt.frozen_stream.disk import weights_hash
from dist_vpt.inference.feature_files import Format, Shard, check_format, join, write_shard
from dist_vpt.inference.load import device_of, refuse_several
from dist_vpt.methods.config_readers import LinearConfig
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.components import Components, build_components

What = Literal["pooled", "blocks", "tokens"]
SHARD_BYTES = 2**27  # of features, at most so many before a file is written
SHARD_IMAGES = 50_000  # whose paths are in the head of a safetensors file


def write_features(recipe: Recipe, out: str, split: str | None, what: What, format: Format) -> dict[str, Any]:
    """Write the features of a split, or of train, val and test; returns the content of features.json.

    The method of the recipe does not matter. Raises UserError for a folder that holds files, a format whose package is
    missing, and blocks of a Swin; DataError for images and splits that cannot be read.
    """
    if LaunchEnv.current().world_size > 1:
        raise UserError("features: works on one process; start it without accelerate launch")
    refuse_several(recipe, "features")
    check_format(format)
    folder = new_folder(out)
    recipe = recipe.model_copy(update={"method": LinearConfig(name="linear", head="standardized")})
    select_device(recipe.runtime.device, LaunchEnv.current())
    recipe, _ = resolve_precision(recipe)
    recipe = recipe.changed("train", test=False).changed("data", rand_augment=None, test_crops=1)
    parts = build_components(recipe, trains=False)
    device = device_of(recipe)
    backbone = parts.method.to(device).eval().backbone
    if what == "blocks" and isinstance(backbone, SwinBackbone):
        raise UserError("--what blocks: the stages of a Swin have widths of their own; use pooled or tokens")
    found = ("train", "val", "test") if split is None else (split,)
    names = [name for name in found if split is not None or getattr(parts.splits, name) is not None]
    facts = {
        "dist_vpt": __version__,
        "what": what,
        "backbone": recipe.backbone.model_dump(mode="json"),
        "weights_sha256": weights_hash(backbone),
        "precision": recipe.runtime.precision,
        "preprocessing": parts.transform.shown
        | {"augment": "none", "mean": parts.inputs.mean, "std": parts.inputs.std},
        "task": recipe.data.task,
        "classes": list(parts.splits.classes),
    }
    with raising_disk_full("the features", folder, "empty the folder and start again"):
        files = [made for name in names for made in _write_split(parts, name, what, format, folder, facts, device)]
        content = facts | {"format": format, "files": files}
        write_atomically(folder / "features.json", to_json(content, indent=1) + "\n")
    print(folder / "features.json")
    return content


def _write_split(  # noqa: PLR0917 (what is written, of which images, where)
    parts: Components, name: str, what: What, format: Format, folder: Path, facts: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """Write the files of a split; returns what features.json lists of each."""
    split, files, waiting = parts.splits[name], list[dict[str, Any]](), list[Shard]()

    def write() -> None:
        shard, file = join(waiting), folder / f"{name}-{len(files):05d}.{format}"
        waiting.clear()
        shape = list(shard.features.shape[1:])
        write_shard(file, shard, format, facts["classes"], facts | {"split": name, "shape": shape})
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        about = {"file": file.name, "split": name, "images": len(shard.paths), "shape": shape, "sha256": sha256}
        files.append(about)

    with closing(parts.evaluation(name, 0, 1)) as batches:
        for batch in batches:
            read = (batch["index"] != PADDING) & (batch["weight"] > 0)
            features = compute(parts.method.backbone, batch["images"].to(device), what).float().cpu()[read]
            paths = [split.where(i) for i in batch["index"][read].tolist()]
            if paths:
                waiting.append(Shard(features, _stored(batch["labels"][read]), paths))
            bytes_waiting = sum(each.features.nbytes for each in waiting)
            if bytes_waiting >= SHARD_BYTES or sum(len(each.paths) for each in waiting) >= SHARD_IMAGES:
                write()
        if waiting:
            write()
        skipped = len(batches.skipped)
    images = sum(each["images"] for each in files)
    print(f"{name}: {images:,} images" + (f", {skipped} unreadable images skipped" if skipped else ""))
    return files


def _stored(labels: Tensor) -> Tensor:
    """Labels of a batch as files have them: of several labels an image uint8, not the loss's floats."""
    return labels.to(torch.uint8) if labels.is_floating_point() else labels


@torch.no_grad()
def compute(backbone: Backbone, images_B3SS: Tensor, what: What) -> Tensor:
    """Features of images: pooled [B, D], what heads read; blocks [B, L, D], the same of the tokens after every block;
    tokens [B, N, D] after the last block. The final norm is applied to all of them.
    """
    if what == "tokens":
        return backbone(images_B3SS)
    tokens_BND, found = backbone.embed(images_B3SS), []
    for number, block in enumerate(backbone.blocks, 1):
        tokens_BND = backbone.run_block(block, tokens_BND)
        if what == "blocks" or number == len(backbone.blocks):
            found.append(backbone.pool(backbone.norm(tokens_BND)))
    return torch.stack(found, 1) if what == "blocks" else found[0]

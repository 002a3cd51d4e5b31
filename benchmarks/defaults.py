"""Each method's default settings beside the learning rates of its published grid, scored on val after the last epoch.

    python benchmarks/defaults.py OUT --methods linear vpt_deep lora --rates 2.5 0.5 0.05 -- dinov2_s14 vtab_folder ...
    python benchmarks/defaults.py OUT --methods linear --scale 10 -- base data.task=digits   # ten times the features
    python benchmarks/defaults.py OUT --counting -- dinov2_s14 data.image_size=56            # a task made by formula

Every run is a folder below OUT; a second call with the same OUT trains only what is missing. --rates are taken instead
of the whole published grid where time is short, always with weight decay 1e-4. --scale trains on a copy of the backbone
whose tokens and features are larger by this factor, and which computes the same otherwise. --counting is a task:
count 1 to 6 discs.
"""

import argparse
import io
import json
import platform
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from dist_vpt.backbones.build import build
from dist_vpt.errors import Diverged
from dist_vpt.experiments.run import run
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.training.inputs import resolve_inputs

TRAIN, VAL, SIDE = 800, 400, 96
KEPT = ("run.resume=auto", "train.test=false", "data.train_on=train", "run.trackers=[]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=["linear"], help="names of method recipes")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="learning rates of the published grid to try; default: all"
    )
    parser.add_argument("--defaults-only", action="store_true", help="train no published setting")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the backbone's tokens and features")
    parser.add_argument("--counting", action="store_true", help="the task made by formula, written to OUT/counting")
    parser.add_argument("recipe", nargs="+", help="recipes and overrides of all runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = list(arguments.recipe)
    if arguments.counting:
        root = write_counting(arguments.out / "counting")
        shared += ["vtab_folder", f"data.root={root}", "data.task=counting"]
    if arguments.scale != 1:
        shared.append(f"backbone.weights={write_scaled(arguments.out, shared, arguments.scale)}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for method in arguments.methods:
        print(line_of(arguments.out, method, shared, arguments.rates, only=arguments.defaults_only), flush=True)


def line_of(out: Path, method: str, shared: Sequence[str], rates: Sequence[float] | None, *, only: bool) -> str:
    """The scores of one method: its default, and (unless ``only``) the best of its published learning rates."""
    default = score(out / method / "default", [*shared, method])
    line = f"{method:12} default {default['top1']:.1f} (loss {default['loss']:.2f})"
    if only:
        return line
    published = load_recipe(*split_arguments([*shared, method, "protocol=published"]))
    scores = {
        lr: score(out / method / f"published-{lr:g}", [*shared, method, "protocol=published", f"optim.lr={lr}"])
        for lr in (rates or published.sweep.grid["optim"]["lr"])
    }
    best = max(scores, key=lambda lr: scores[lr]["top1"])
    found = ", ".join(f"{lr:g}: {each['top1']:.1f}" for lr, each in scores.items())
    difference = default["top1"] - scores[best]["top1"]
    return f"{line}, published best {scores[best]['top1']:.1f} at lr {best:g}, difference {difference:+.1f}  [{found}]"


def score(folder: Path, recipe: Sequence[str]) -> dict[str, float]:
    """Val's scores after the last epoch of one run; 0 % and no loss where it diverged. Other errors are raised."""
    kept = folder / "scores.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    names, overrides = split_arguments([*recipe, *KEPT, f"run.dir={folder}"])
    try:
        with redirect_stdout(io.StringIO()):  # its log is in its folder
            result: dict[str, Any] = run(load_recipe(names, overrides))
    except Diverged as error:
        print(f"{folder}: {error}")
        return {"top1": 0.0, "loss": float("nan")}
    scores = {key: result["last"]["val"][key] for key in ("top1", "loss")}
    kept.write_text(json.dumps(scores))
    return scores


def write_counting(root: Path) -> Path:
    """A vtab-1k folder: 1 to 6 discs of random colors, sizes and places; the class is how many there are."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    draw, lines = np.random.default_rng(0), []
    for i in range(TRAIN + VAL):
        count = int(draw.integers(1, 7))
        image = Image.new("RGB", (4 * SIDE, 4 * SIDE), color(draw))
        canvas = ImageDraw.Draw(image)
        for _ in range(count):
            radius = draw.uniform(0.06, 0.12) * 4 * SIDE
            x, y = draw.uniform(radius, 4 * SIDE - radius, 2)
            box = (x - radius, y - radius, x + radius, y + radius)
            canvas.ellipse(box, fill=color(draw), outline=(0, 0, 0))
        image.resize((SIDE, SIDE), Image.Resampling.BOX).save(root / "images" / f"{i}.png")
        lines.append(f"images/{i}.png {count - 1}\n")
    lists = {"train800": lines[:TRAIN], "val200": lines[TRAIN:], "train800val200": lines, "test": lines[TRAIN:]}
    for name, kept in lists.items():
        (root / f"{name}.txt").write_text("".join(kept))
    return root


def color(draw: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(value) for value in draw.integers(0, 256, 3))


@torch.no_grad()
def write_scaled(out: Path, arguments: Sequence[str], factor: float) -> Path:
    """Weights of the same ViT with tokens and features larger by a factor: blocks normalize what they read."""
    recipe = load_recipe(*split_arguments([*arguments, "linear"]))
    inputs = resolve_inputs(recipe)
    backbone, _ = build(recipe.backbone, image_size=inputs.transform.image_size, mean=inputs.mean, std=inputs.std)
    scaled = [backbone.stem.cls_token, backbone.stem.pos_embed, *backbone.stem.patch_embed.proj.parameters()]
    for block in backbone.blocks:
        for last, layer_scale in ((block.attn.proj, block.ls1), (block.mlp.fc2, block.ls2)):
            scaled += [layer_scale.gamma] if hasattr(layer_scale, "gamma") else list(last.parameters())
    for tensor in (*scaled, *backbone.norm.parameters()):
        tensor.mul_(factor)
    path = out / f"scaled-{factor:g}.safetensors"
    save_file({backbone.timm_name(name): t.contiguous() for name, t in backbone.state_dict().items()}, path)
    return path


if __name__ == "__main__":
    main()

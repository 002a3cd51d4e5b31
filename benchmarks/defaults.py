"""Each method's default settings beside the best of its published grid, scored on val after the last epoch.

    python benchmarks/defaults.py OUT --methods linear vqt vpt_deep -- base data.task=digits               # whole grids
    python benchmarks/defaults.py OUT --methods lora --weight-decays 1e-4 -- dinov2_s14 vtab_folder ...    # all rates
    python benchmarks/defaults.py OUT --methods linear --scale 10 -- base data.task=digits   # ten times the features
    python benchmarks/defaults.py OUT --counting -- dinov2_s14 data.image_size=56            # a task made by formula

The trials of a grid are a sweep's: a reader's are trained together, a writer's one after the other, with
sweep.search=halving in rungs. A second call with the same OUT trains only what is missing. Where time is short, --rates
and --weight-decays are taken alone out of those of the grid. --scale trains on a copy of the backbone whose tokens and
features are larger by this factor, and which computes the same otherwise. --counting is a task: count 1 to 6 discs;
--counting 4000 scores on so many images, and --counting-seed N draws others: both show what is luck of a few images.
"""

import argparse
import io
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from safetensors.torch import save_file

from dist_vpt.backbones.build import build
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import Diverged
from dist_vpt.experiments.run import run
from dist_vpt.experiments.rungs import Rungs
from dist_vpt.experiments.sweep_grid import SweepJob, setting_text
from dist_vpt.experiments.sweep_worker import Worker
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import leave_accelerate_as_it_is
from dist_vpt.training.inputs import resolve_inputs

TRAIN, VAL, SIDE = 800, 400, 96
KEPT = ("run.resume=auto", "train.test=false", "data.train_on=train", "run.trackers=[]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=["linear"], help="names of method recipes")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates to try; default: all of the grid")
    parser.add_argument("--weight-decays", nargs="+", type=float, help="likewise")
    parser.add_argument("--defaults-only", action="store_true", help="train no published setting")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the backbone's tokens and features")
    parser.add_argument(
        "--counting",
        nargs="?",
        type=int,
        const=VAL,
        metavar="IMAGES",
        help=f"the task made by formula, written below OUT, with so many images of val (not given: {VAL})",
    )
    parser.add_argument("--counting-seed", type=int, default=0, help="another number: other images of that task")
    parser.add_argument("recipe", nargs="+", help="recipes and overrides of all runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = list(arguments.recipe)
    if arguments.counting is not None:
        name = f"counting-{arguments.counting}-{arguments.counting_seed}"
        root = write_counting(arguments.out / name, arguments.counting, arguments.counting_seed)
        shared += ["vtab_folder", f"data.root={root}", "data.task=counting"]
    if arguments.scale != 1:
        shared.append(f"backbone.weights={write_scaled(arguments.out, shared, arguments.scale)}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    narrow = {"lr": arguments.rates, "weight_decay": arguments.weight_decays}
    for method in arguments.methods:
        line = default_line(arguments.out / method, method, shared)
        if not arguments.defaults_only:
            line += grid_line(arguments.out / method, method, shared, narrow)
        print(f"{method:12} {line}", flush=True)


def default_line(out: Path, method: str, shared: Sequence[str]) -> str:
    """The scores of a method's default."""
    default = score(out / "default", [*shared, method])
    return f"default {default['top1']:.1f} (loss {default['loss']:.2f})"


def grid_line(out: Path, method: str, shared: Sequence[str], narrow: Mapping[str, Sequence[float] | None]) -> str:
    """The best of a method's published grid and, for each learning rate, the best of its weight decays."""
    outcomes = train_grid(out / "published", [*shared, method, "protocol=published"], narrow)
    found = [(0.0 if each["diverged"] else each["last"]["val"]["top1"], each["setting"]) for each in outcomes]
    best, setting = max(found, key=itemgetter(0))  # of equal ones the first
    by_rate: dict[float, float] = {}
    for top1, each in found:
        by_rate[each["optim.lr"]] = max(top1, by_rate.get(each["optim.lr"], 0.0))
    default = json.loads((out / "default/scores.json").read_text())["top1"]
    return (
        f", published best {best:.1f} of {len(found)} at {setting_text(setting)}, difference {default - best:+.1f}  "
        f"[{', '.join(f'{lr:g}: {top1:.1f}' for lr, top1 in by_rate.items())}]"
    )


def train_grid(
    folder: Path, recipe: Sequence[str], narrow: Mapping[str, Sequence[float] | None]
) -> list[dict[str, Any]]:
    """Train what is missing of a recipe's grid, as a sweep does; what a sweep keeps of each trial of the last rung.

    ``narrow``: keys of ``optim`` and the values to try alone; None: all. A trial keeps its place in the whole grid.
    """
    names, overrides = split_arguments([*recipe, *KEPT, f"run.dir={folder}"])
    resolved, _ = resolve_precision(load_recipe(names, overrides))
    rungs, launch = Rungs(resolved, folder), LaunchEnv.current()
    folder.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop, ExitStack() as stack, redirect_stdout(io.StringIO()):
        leave_accelerate_as_it_is(stack)
        worker = Worker(resolved, RunFolder(folder), 0, 1, stop, Console(file=io.StringIO()), launch, RankStatus())
        while jobs := rungs.next():
            kept = [job for job in jobs if is_of(job, narrow)]
            worker.work(kept)
            rungs.add(kept, worker.wait_for(kept))
        return rungs.done[-1].outcomes


def is_of(job: SweepJob, narrow: Mapping[str, Sequence[float] | None]) -> bool:
    return all(not values or job.setting[f"optim.{key}"] in values for key, values in narrow.items())


def score(folder: Path, recipe: Sequence[str]) -> dict[str, float]:
    """Val's scores after the last epoch of one run; 0 % and no loss where it diverged. Other errors are raised."""
    kept = folder / "scores.json"
    if kept.is_file():
        found = json.loads(kept.read_text())
        if (of := found.pop("recipe", [*recipe])) != [*recipe]:
            raise SystemExit(f"{kept}: holds the scores of {' '.join(of)}; name another OUT")
        return found
    names, overrides = split_arguments([*recipe, *KEPT, f"run.dir={folder}"])
    try:
        with redirect_stdout(io.StringIO()):  # its log is in its folder
            result: dict[str, Any] = run(load_recipe(names, overrides))
    except Diverged as error:
        print(f"{folder}: {error}")
        return {"top1": 0.0, "loss": float("nan")}
    scores = {key: result["last"]["val"][key] for key in ("top1", "loss")}
    kept.write_text(json.dumps({**scores, "recipe": [*recipe]}))
    return scores


def write_counting(root: Path, val: int, seed: int) -> Path:
    """A vtab-1k folder: 1 to 6 discs of random colors, sizes and places; the class is how many there are.

    ``val``: images of val. The first of them, and those of train, are the same whatever this number is. ``seed``: of
    all that is random.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    draw, lines = np.random.default_rng(seed), []
    for i in range(TRAIN + val):
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

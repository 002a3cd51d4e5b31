"""Time of VQT's training step as published, and on the frozen stream: live, cached, shared by many trials.

B images of a batch, n images of the cache, S image side, K classes, T trials.

    python benchmarks/sweep.py [RECIPE...] a.b=c ... [--trials T] [--images N] [--published-batch M] [--out DIR]

The recipe's words go on top of benchmarks/sweep.yaml. One process measures all ways on the same images, weights and
threads, in turns, in float32 and, on machines that compute faster in it, with the frozen weights and the stream in
bfloat16:

- ``published``: queries and image tokens in one autograd graph (published_vqt.py), a batch of ``--published-batch``.
- ``split``: the package's VQT from pixels: the frozen stream without autograd, then what the queries read of it.
- ``cached``: the same from a cache of the frozen stream; taking a random batch's rows out of it is part of the time.
- ``cached_trials``: T trials of their own initialization and optimizer in one pass over such a batch.

A step is forward, loss, backward and update of a batch; all but the published way are the step of ``dist-vpt sweep``.
Before anything is timed all ways must give the same logits. The last line of the output is one JSON object, which
also goes to a file in ``--out``; numbers are by way and precision:

- ``seconds_per_image_and_trial``: median wall-clock time of a step / (images x trials).
- ``ratio_split``, ``ratio_cached``, ``ratio_cached_trials``: time of the published way in float32 / time of this one.
- ``ratio_..._same_precision``: time of the published way in the same precision / time of this one.
- ``saved_for_backward_mib``: per image and trial, counted as in step.py, what is read of the cache included.
- ``floor``: for the cached ways one read of a batch's rows at the measured memory bandwidth (a large copy), and the
  matrix products of a step at the measured rate, one after the other; ``time_over_floor`` is time / that.
- ``attention``: the kernel of the blocks, live and published alike: the quicker one in each precision.
- ``logits_difference``: the largest to the published way's, relative to its largest logit (biases left out).
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from published_vqt import PublishedVQT
from step import (
    LR,
    conclude,
    count,
    machine,
    name_on_device,
    parser_of,
    rounded,
    saved_for_backward,
    synthetic_batches,
)
from torch import Tensor, nn
from ways import TOLERANCE, WAYS, Numbers, Way, floor, ratios, rounded_numbers, time_in_turns

from dist_vpt.backbones.vit import Backbone
from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.data.loaders import Batch
from dist_vpt.distributed.launch_env import ALONE
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.errors import RunFailed, UserError
from dist_vpt.frozen_stream.cache import StreamCache, nbytes
from dist_vpt.frozen_stream.config import StreamConfig
from dist_vpt.frozen_stream.observe import StreamOutput, StreamSpec, compute_stream
from dist_vpt.methods.vqt import VQT
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runtime.peak_memory import MIB
from dist_vpt.runtime.precision import choose_precision, resolve_precision
from dist_vpt.training.accelerator import make_accelerator
from dist_vpt.training.components import DTYPES, build_method, build_reader
from dist_vpt.training.inputs import resolve_inputs
from dist_vpt.training.optim import build_optimizer, set_lr
from dist_vpt.training.step_graph import WARM_UP
from dist_vpt.training.trial_state import Trial
from dist_vpt.training.trials import TrialGroup, step_trials

DEFAULTS = Path(__file__).with_suffix(".yaml")
FILL_BATCH = 16  # images of the stream computed at once
# The quicker kernel for the blocks, live and published alike; on GPUs it is sdpa in both.
CPU_ATTENTION = {"fp32": "sdpa", "bf16": "eager"}


def main(argv: list[str] | None = None) -> int:
    """Benchmark one recipe, print its JSON and write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)

    def call() -> None:
        files, overrides = split_arguments(arguments.recipe)
        recipe, _ = resolve_precision(load_recipe([DEFAULTS, *files], overrides, protocol="published"))
        result = benchmark(recipe, arguments)
        conclude(result, Path(arguments.out) / file_name(result))

    return run_with_exit_code(call, debug=arguments.debug)


def benchmark(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one recipe."""
    load = round(os.getloadavg()[0], 1)
    _check(recipe)
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": LR, "scale_lr": False})})
    accelerator = make_accelerator(recipe, ALONE)
    device, batch = accelerator.device, recipe.train.batch_size
    images = options.images or max(batch, 32 if device.type == "cpu" else 1000)
    if images < batch:
        raise UserError(f"--images {images}: must be at least a batch, {batch}; raise it or lower train.batch_size")
    micro = min(batch, options.published_batch)
    photos = synthetic_batches(_with_batch(recipe, images), resolve_inputs(recipe), options.classes)[0]
    ways: dict[str, dict[str, Way]] = {name: {} for name in ("published", *WAYS)}
    differences: Numbers = {name: {} for name in WAYS}
    for precision in measured_precisions(recipe):
        bench = make_bench(recipe, precision, options, photos, accelerator)
        for name, difference in bench.logits_differences(photos["images"][:micro].to(device)).items():
            differences[name][precision] = rounded(difference)
        for name, way in bench.ways(photos, batch, micro).items():  # also warms each way up
            ways[name][precision] = way
    seconds = time_in_turns(ways, device, options.repeats)
    return {
        "seconds_per_image_and_trial": rounded_numbers(seconds),
        **ratios(seconds),
        "saved_for_backward_mib": {name: {p: round(w.saved, 3) for p, w in by.items()} for name, by in ways.items()},
        "floor": floor(ways, seconds, device),
        "logits_difference": differences,
        "method": recipe.method.name,
        "method_settings": recipe.method.model_dump(mode="json", exclude={"name"}),
        "queries": cast(Any, recipe.method).queries,
        "trials": options.trials,
        "backbone": recipe.backbone.name,
        "image_size": photos["images"].shape[-1],
        "attention": attention(device),
        "classes": options.classes,
        "batch": batch,
        "published_batch": micro,
        "images": images,
        "cache": "device" if options.device_cache else "memory",
        "optimizer": recipe.optim.name,
        "repeats": options.repeats,
        "device": device_name(device),
        "device_type": device.type,
        "machine": machine(load),
        "versions": versions(),
    }


@dataclass
class Bench:
    """Everything that is trained in one precision, on one frozen backbone."""

    recipe: Recipe
    accelerator: Accelerator
    published: PublishedVQT
    readers: list[VQT]
    cache: StreamCache  # as one trial has it
    shared: StreamCache  # as several have it

    def logits_differences(self, images_B3SS: Tensor) -> dict[str, float]:
        """Of the first trial's logits in each way from the published way's. Raises RunFailed where they disagree."""
        first, index_B = self.readers[0], torch.arange(len(images_B3SS))
        with torch.no_grad():
            torch.manual_seed(self.recipe.seed)  # dropout draws alike
            wanted_BK = self.published(images_B3SS)
            cached, shared = (send_to_device(c[index_B], self.accelerator.device) for c in (self.cache, self.shared))
            seeds = [self.recipe.seed] * len(self.readers)
            found = {
                "split": first.read_many([first], compute_stream(first.backbone, images_B3SS, first.spec), seeds[:1])[
                    0
                ],
                "cached": first.read_many([first], cached, seeds[:1])[0],
                "cached_trials": first.read_many(self.readers, shared, seeds)[0],
            }
        scale = (wanted_BK - cast(nn.Linear, self.published.head).bias.detach()).abs().max()
        precision = self.recipe.runtime.precision
        differences = {name: float((each_BK - wanted_BK).abs().max() / scale) for name, each_BK in found.items()}
        wrong = [f"{name} {value:.1e}" for name, value in differences.items() if not value <= TOLERANCE[precision]]
        if wrong:
            raise RunFailed(
                f"logits in {precision} differ from the published way's by {', '.join(wrong)} of the largest, and "
                f"{TOLERANCE[precision]:.0e} is allowed: nothing was timed; correct what differs first"
            )
        return differences

    def ways(self, photos: Batch, batch: int, micro: int) -> dict[str, Way]:
        """What is timed, each way with its own optimizers."""
        own_cache, shared_cache = photos.copy(), photos.copy()
        own_cache["images"], shared_cache["images"] = self.cache, self.shared
        one, many = self.readers[:1], self.readers
        backbone, own, shared = one[0].backbone, one[0].spec, one[0].shared_spec
        return {
            "published": self._published(photos, micro),
            "split": self._trials(one, photos, batch, 0),
            "cached": self._trials(one, own_cache, batch, nbytes(backbone, own, batch)),
            "cached_trials": self._trials(many, shared_cache, batch, nbytes(backbone, shared, batch)),
        }

    def _published(self, photos: Batch, batch: int) -> Way:
        optimizer = build_optimizer(self.recipe.optim, self.published)
        set_lr(optimizer, LR)
        smoothing, draw = self.recipe.train.label_smoothing, random_batches(photos, batch)

        def step() -> None:
            some = draw()
            images, labels_B = (x.to(self.accelerator.device) for x in (some["images"], some["labels"]))
            F.cross_entropy(self.published(images), labels_B, label_smoothing=smoothing).backward()
            optimizer.step()
            optimizer.zero_grad()

        saved = saved_for_backward(self.published, step)
        return Way(step, batch, saved / MIB / batch)

    def _trials(self, readers: list[VQT], kept: Batch, batch: int, read_bytes: int) -> Way:
        trials = [Trial(_with_seed(self.recipe, t), reader) for t, reader in enumerate(readers)]
        nowhere = cast(Any, None)
        p = TrialGroup(
            recipe=trials[0].recipe,
            trials=trials,
            parts=nowhere,
            accelerator=self.accelerator,
            train=cast(Any, SimpleNamespace(steps_per_epoch=sys.maxsize)),  # all that the step asks of it
            val=None,
            class_weights=torch.ones(cast(nn.Linear, readers[0].head).out_features, device=self.accelerator.device),
            stop=StopSignal(),  # never entered: signals keep their meaning
            state=nowhere,
            show=print,
        )
        draw = random_batches(kept, batch)

        def step() -> None:
            step_trials(p, [draw()])
            p.progress.step += 1
            p.read_steps(but=1)

        step()  # puts the trials' tensors into stacks
        saved = saved_for_backward(nn.ModuleList(readers), step)
        for _ in range(WARM_UP if self.accelerator.device.type == "cuda" else 0):
            step()  # from then on it is replayed, where it can be
        return Way(step, batch * len(trials), saved / MIB / batch / len(trials), read_bytes)


def measured_precisions(recipe: Recipe) -> list[str]:
    """fp32, and bf16 where this machine computes faster in it."""
    name, reason = choose_precision(cpu=recipe.runtime.device == "cpu")
    if name == "bf16":
        return ["fp32", "bf16"]
    print(f"bf16 is not measured, {reason}", flush=True)
    return ["fp32"]


def make_bench(
    recipe: Recipe, precision: str, options: argparse.Namespace, photos: Batch, accelerator: Accelerator
) -> Bench:
    """Build the published way and all trials on one backbone, and compute the frozen stream of all images."""
    own = {"precision": precision, "attention": attention(accelerator.device)[precision]}
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update=own)})
    method, _ = build_method(recipe, resolve_inputs(recipe), options.classes)
    first = cast(VQT, method.to(accelerator.device))
    others = [
        cast(VQT, build_reader(_with_seed(recipe, t), first.backbone, options.classes).to(accelerator.device))
        for t in range(1, options.trials)
    ]
    torch.manual_seed(recipe.seed)
    published = PublishedVQT(cast(Any, recipe.method), first.backbone, options.classes, DTYPES[precision])
    cache_device = accelerator.device if options.device_cache else torch.device("cpu")
    cache, shared = (
        make_cache(first.backbone, spec, photos["images"], accelerator.device, cache_device)
        for spec in (first.spec, first.shared_spec)
    )
    for method in (first, *others, published):
        method.train()
    return Bench(recipe, accelerator, published.to(accelerator.device), [first, *others], cache, shared)


def make_cache(
    backbone: Backbone, spec: StreamSpec, images_n3SS: Tensor, device: torch.device, cache_device: torch.device
) -> StreamCache:
    """The frozen stream of all images, computed on ``device`` and held in ``place``."""
    parts = []
    for images_B3SS in images_n3SS.split(FILL_BATCH):
        stream = compute_stream(backbone, images_B3SS.to(device), spec)
        parts.append(send_to_device(stream, cache_device))
    pooled, *fields = zip(*parts, strict=True)

    def joined(blocks: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
        return tuple(torch.cat(block) for block in zip(*blocks, strict=True))

    return StreamCache(StreamOutput(torch.cat(pooled), *map(joined, fields)), np.ones(len(images_n3SS), bool))


def random_batches(kept: Batch, batch: int) -> Callable[[], Batch]:
    """Draws a batch of what is kept of all images: their pixels, or a cache's rows."""
    noise = torch.Generator().manual_seed(0)
    return lambda: rows(kept, torch.randperm(len(kept["labels"]), generator=noise)[:batch])


def rows(kept: Batch, index_B: Tensor) -> Batch:
    """Some of the images."""
    return Batch(
        images=kept["images"][index_B],
        labels=kept["labels"][index_B],
        weight=kept["weight"][index_B],
        index=kept["index"][index_B],
    )


def attention(device: torch.device) -> dict[str, str]:
    """The kernel by precision."""
    return CPU_ATTENTION if device.type == "cpu" else dict.fromkeys(CPU_ATTENTION, "sdpa")


def file_name(result: dict[str, Any]) -> str:
    """``sweep-vqt-BACKBONE-qQUERIES-bBATCH-tTRIALS-DEVICE.json``."""
    sizes = [f"q{result['queries']}", f"b{result['batch']}", f"t{result['trials']}"]
    return name_on_device(["sweep", result["method"], result["backbone"], *sizes], result)


def _check(recipe: Recipe) -> None:
    """Raises UserError for what this benchmark sets itself, or does not measure."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("benchmarks/sweep.py measures one process; start it with `python`, not with a launcher")
    wrong = []
    if recipe.method.name != "vqt":
        wrong.append(f"method.name = {recipe.method.name}: only vqt has a published way to be measured against")
    if recipe.runtime.precision != "fp32":
        wrong.append(f"runtime.precision = {recipe.runtime.precision}: both are measured; leave it out")
    if recipe.runtime.attention != "auto":
        wrong.append(f"runtime.attention = {recipe.runtime.attention}: the quicker kernel is used; leave it out")
    if recipe.train.grad_accum_steps != 1:
        wrong.append(f"train.grad_accum_steps = {recipe.train.grad_accum_steps}: must be 1 here; use --published-batch")
    if recipe.stream != StreamConfig():
        wrong.append("stream: live and cached are both measured; leave it out (--device-cache is for GPUs)")
    if wrong:
        raise UserError("\n".join(wrong))


def _with_batch(recipe: Recipe, batch: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"batch_size": batch})})


def _with_seed(recipe: Recipe, trial: int) -> Recipe:
    return recipe.model_copy(update={"seed": recipe.seed + trial})


def _parser() -> argparse.ArgumentParser:
    about = "VQT's training step as published, and on the frozen stream."
    parser = parser_of("sweep.py", about, repeats=3, of="timed steps of each way")
    add = parser.add_argument
    add("--trials", type=count, default=20, metavar="T", help="trials of one pass (default 20)")
    add("--images", type=count, metavar="N", help="images in the cache (default 32, on a GPU 1000; at least a batch)")
    add("--published-batch", type=count, default=16, metavar="M", help="batch of the published way (default 16)")
    add("--device-cache", action="store_true", help="keep the cache on the GPU instead of in host memory")
    return parser


if __name__ == "__main__":
    sys.exit(main())

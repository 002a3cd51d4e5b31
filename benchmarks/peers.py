"""Time of a training step beside that of PEFT, or of a plain loop over a timm model.

B images of a batch, S image side, K classes.

    python benchmarks/peers.py [RECIPE...] a.b=c ... [--repeats N] [--classes K] [--out DIR]

The recipe's words go on top of benchmarks/peers.yaml. One process measures both on the same weights, images and
threads, in turns. The package's step is the engine's, as in step.py. Its peer is a timm model in a loop of forward,
loss, backward, ``AdamW.step`` and ``zero_grad``, trained as the method says:

- ``lora``: by PEFT (the extra ``bench``): the rank on the layer ``qkv``, which trains as many numbers as two of
  queries, keys and values, and the head.
- ``full``: all parameters. ``linear``: the head.

In bf16 the peer computes under autocast, and what is frozen is held in bf16, as the package does; its images are
normalized before the loop, while the package's step normalizes them. Before anything is timed both must give the same
logits, and train equally many numbers. The last line of the output is one JSON object, which also goes to a file in
``--out``:

- ``ratio``: median over the turns of the package's time over the peer's in the same turn: on a machine that is shared,
  much steadier than the times themselves. ``ratio_quartiles``: the middle half of them.
- ``step_ms``: median wall-clock time of a step of each.
- ``saved_for_backward_mib``: counted as in step.py, of one batch of each.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from step import (
    LR,
    conclude,
    machine,
    micro_batch_loss,
    name_on_device,
    parser_of,
    rounded,
    saved_for_backward,
    synchronize,
    synthetic_batches,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dist_vpt.backbones.build import timm_model
from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.data.loaders import Batch
from dist_vpt.errors import RunFailed, UserError
from dist_vpt.inference.merge import timm_tensors
from dist_vpt.methods.config import LoRAConfig
from dist_vpt.planning.measure import make_training
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runtime.peak_memory import MIB
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.components import DTYPES
from dist_vpt.training.engine import TrainState, train_step
from dist_vpt.training.inputs import Inputs, resolve_inputs

DEFAULTS = Path(__file__).with_suffix(".yaml")
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of logits, relative; half precision rounds in every block
METHODS = ("lora", "full", "linear")


def main(words: list[str] | None = None) -> int:
    """Benchmark one recipe beside its peer, print its JSON and write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(words)

    def call() -> None:
        files, overrides = split_arguments(arguments.recipe)
        recipe, _ = resolve_precision(load_recipe([DEFAULTS, *files], overrides))
        result = benchmark(recipe, repeats=arguments.repeats, classes=arguments.classes)
        conclude(result, Path(arguments.out) / file_name(result))

    return run_with_exit_code(call, debug=arguments.debug)


def benchmark(recipe: Recipe, *, repeats: int, classes: int) -> dict[str, Any]:
    """All numbers of one recipe."""
    load = round(os.getloadavg()[0], 1)
    _check(recipe)
    recipe = recipe.changed("optim", lr=LR, scale_lr=False).changed("method", head="published")
    inputs = resolve_inputs(recipe)
    training = make_training(recipe, inputs, classes)
    device = training.accelerator.device
    batches = synthetic_batches(recipe, inputs, classes)
    peer = make_peer(recipe, training, inputs, classes)
    on_device = {name: value.to(device) for name, value in batches[0].items()}  # type: ignore[attr-defined]
    images_B3SS, labels_B = normalized(on_device["images"], inputs), on_device["labels"]
    difference = logits_difference(recipe, training, peer, on_device["images"], images_B3SS)
    trained = sum(p.numel() for p in peer.parameters() if p.requires_grad)
    if trained != training.parameters["trained"]:
        raise RunFailed(f"the peer trains {trained} numbers, and dist_vpt {training.parameters['trained']}")
    saved = {
        "dist_vpt": saved_for_backward(training.method, lambda: micro_batch_loss(training.model, recipe, on_device)),  # type: ignore[arg-type]
        "peer": saved_for_backward(peer, lambda: peer_loss(peer, recipe, images_B3SS, labels_B)),
    }
    seconds = time_in_turns(
        {"dist_vpt": own_step(training, batches), "peer": peer_step(peer, recipe, images_B3SS, labels_B)},
        device,
        repeats,
    )
    turns = sorted(ours / theirs for ours, theirs in zip(seconds["dist_vpt"], seconds["peer"], strict=True))
    return {
        "ratio": rounded(statistics.median(turns)),
        "ratio_quartiles": [rounded(turns[len(turns) // 4]), rounded(turns[(3 * len(turns) - 1) // 4])],
        "step_ms": {name: rounded(statistics.median(each) * 1e3) for name, each in seconds.items()},
        "saved_for_backward_mib": {name: round(each / MIB, 3) for name, each in saved.items()},
        "logits_difference": rounded(difference),
        "peer": "peft" if recipe.method.name == "lora" else "timm",
        "method": recipe.method.name,
        "method_settings": recipe.method.model_dump(mode="json", exclude={"name"}),
        "backbone": recipe.backbone.name,
        "image_size": images_B3SS.shape[-1],
        "classes": classes,
        "batch": len(labels_B),
        "precision": recipe.runtime.precision,
        "attention": training.method.backbone.chosen["attention"],
        "trained": trained,
        "repeats": repeats,
        "device": device_name(device),
        "device_type": device.type,
        "machine": machine(load),
        "versions": versions() | ({"peft": peft_module().__version__} if recipe.method.name == "lora" else {}),
    }


def make_peer(recipe: Recipe, training: TrainState, inputs: Inputs, classes: int) -> nn.Module:
    """The timm model with the same weights, trained as the method says; what is frozen is in the recipe's precision."""
    described = timm_model(recipe.backbone, inputs.transform.image_size, classes)
    plain = described.architecture == "VisionTransformer"  # of no name, as the demo's
    model = (
        VisionTransformer(**described.options)
        if plain
        else timm.create_model(str(described.architecture), **described.options)
    )
    if described.pool is not None:
        model.reset_classifier(classes, described.pool)
    model.load_state_dict({name: t.float() for name, t in timm_tensors(training.method).items()})
    method = recipe.method
    if method.name == "full":
        return model.to(training.accelerator.device).train()
    model.requires_grad_(False).to(DTYPES[recipe.runtime.precision])
    model.head.float()
    if isinstance(method, LoRAConfig):
        peft = peft_module()
        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=["qkv"],
            modules_to_save=["head"],
        )
        model = peft.get_peft_model(model, config)
    else:
        model.head.requires_grad_(True)
    return model.to(training.accelerator.device).train()


def peft_module() -> Any:
    """PEFT. Raises UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("PEFT is not installed; pip install 'dist-vpt[bench]'") from error
    return peft


def normalized(images_B3SS: Tensor, inputs: Inputs) -> Tensor:
    """Pixels of 0 to 255 as a timm model wants them."""
    mean_311, std_311 = (torch.tensor(v, device=images_B3SS.device).view(3, 1, 1) for v in (inputs.mean, inputs.std))
    return (images_B3SS / 255 - mean_311) / std_311


def logits_difference(
    recipe: Recipe, training: TrainState, peer: nn.Module, images_B3SS: Tensor, normalized_B3SS: Tensor
) -> float:
    """The largest, relative to the peer's largest logit. Raises RunFailed where the two disagree."""
    with torch.no_grad(), autocast(recipe, images_B3SS.device):
        wanted_BK, found_BK = peer(normalized_B3SS).float(), training.model(images_B3SS).float()
    difference = float((found_BK - wanted_BK).abs().max() / wanted_BK.abs().max())
    if not difference <= TOLERANCE[recipe.runtime.precision]:
        raise RunFailed(f"logits differ from the peer's by {difference:.1e} of the largest: nothing was timed")
    return difference


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    dtype = DTYPES[recipe.runtime.precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peer_loss(peer: nn.Module, recipe: Recipe, images_B3SS: Tensor, labels_B: Tensor) -> Tensor:
    with autocast(recipe, images_B3SS.device):
        return F.cross_entropy(peer(images_B3SS), labels_B, label_smoothing=recipe.train.label_smoothing)


def peer_step(peer: nn.Module, recipe: Recipe, images_B3SS: Tensor, labels_B: Tensor) -> Callable[[], None]:
    """The plain loop's step."""
    trained = [p for p in peer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=recipe.optim.weight_decay)

    def step() -> None:
        peer_loss(peer, recipe, images_B3SS, labels_B).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def own_step(training: TrainState, batches: list[Batch]) -> Callable[[], None]:
    """The engine's step."""

    def step() -> None:
        train_step(training, batches, norms=False)
        training.progress.step += 1

    return step


def time_in_turns(steps: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step in each turn, the one that begins alternating; two turns before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(2 + repeats):
        for name in list(steps) if turn % 2 else reversed(steps):
            synchronize(device)
            began = time.perf_counter()
            steps[name]()
            synchronize(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def file_name(result: dict[str, Any]) -> str:
    """``peers-METHOD-BACKBONE-bBATCH-PRECISION-DEVICE.json``."""
    words = ["peers", result["method"], result["backbone"], f"b{result['batch']}", result["precision"]]
    return name_on_device(words, result)


def _check(recipe: Recipe) -> None:
    """Raises UserError for what the peers do not do alike."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("benchmarks/peers.py measures one process; start it with `python`, not with a launcher")
    wrong, method = [], recipe.method
    if method.name not in METHODS:
        wrong.append(f"method.name = {method.name}: only {', '.join(METHODS)} have a peer here")
    if isinstance(method, LoRAConfig) and (len(method.targets) != 2 or not {*method.targets} < {"q", "k", "v"}):
        wrong.append(
            f"method.targets = {list(method.targets)}: must be two of q, k and v, which train as many numbers as "
            "PEFT does on qkv"
        )
    if recipe.optim.name != "adamw":
        wrong.append(f"optim.name = {recipe.optim.name}: the peer's is adamw")
    if recipe.runtime.precision not in TOLERANCE:
        wrong.append(f"runtime.precision = {recipe.runtime.precision}: must be one of {', '.join(TOLERANCE)}")
    if recipe.train.grad_accum_steps != 1:
        wrong.append(f"train.grad_accum_steps = {recipe.train.grad_accum_steps}: must be 1 here")
    if wrong:
        raise UserError("\n".join(wrong))


def _parser() -> argparse.ArgumentParser:
    return parser_of("peers.py", "A training step beside PEFT's or a plain loop's.", repeats=10, of="timed turns")


if __name__ == "__main__":
    sys.exit(main())

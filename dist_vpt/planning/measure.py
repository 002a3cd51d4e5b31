"""One training step of the engine on this machine: its memory beside the estimate, and speeds of earlier benchmarks."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError

from dist_vpt.backbones.weights.zoo import architecture
from dist_vpt.data.joined import Joined
from dist_vpt.data.transforms import ImageTransform
from dist_vpt.data.workers import PIXELS, Batch
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.signals import StopSignal
from dist_vpt.methods.config import MethodConfig
from dist_vpt.planning.choices import as_counted
from dist_vpt.planning.footprint import footprint
from dist_vpt.planning.machines import size
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.folder import RunFolder
from dist_vpt.runs.progress import Progress
from dist_vpt.training.accelerator import make_accelerator, prepare
from dist_vpt.training.averaging import WeightAverage
from dist_vpt.training.components import build_method
from dist_vpt.training.engine import TrainState, train_step
from dist_vpt.training.inputs import Inputs, augmentation_of, resolve_inputs

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"  # in a clone


def known_speeds(recipe: Recipe, device_type: str) -> Iterator[str]:
    """A line for each benchmark, among a clone's results, of this method with these settings on this architecture,
    precision and type of device.
    """
    for file in sorted(RESULTS.glob("step-*.json")) if recipe.backbones is None else ():
        result = json.loads(file.read_text())
        try:
            method = TypeAdapter(MethodConfig).validate_python({"name": result["method"], **result["method_settings"]})
        except ValidationError:  # from a version whose methods had other settings
            continue
        key = (method, architecture(result["backbone"]), result["precision"], result["device_type"])
        if key == (recipe.method, architecture(recipe.backbone.name), recipe.runtime.precision, device_type):
            yield (
                f"measured: {result['images_per_s']:.3g} images/s with checkpointing {result['checkpointing']}, batch "
                f"{result['batch']} at {result['image_size']} px on {result['device']} ({file.name})"
            )


def measure(recipe: Recipe, classes: int) -> str:
    """The peak of a training step on this machine, in one process, and the estimate beside it."""
    gpus = recipe.runtime.device != "cpu" and torch.cuda.is_available()
    per_device = footprint(as_counted(recipe, gpus=gpus), classes, gpus=gpus).on("ddp", 1)
    estimate, found = per_device.held + per_device.working, measured_bytes(recipe, classes)  # nothing is evaluated here
    return (
        f"measured: {size(found)} at the peak of a training step on this machine, estimated {size(estimate)} "
        f"({100 * (estimate / found - 1):+.1f} %)"
    )


def measured_bytes(recipe: Recipe, classes: int) -> int:
    """The peak of the engine's second step, in one process, as torch's allocators report it."""
    inputs = resolve_inputs(recipe)
    training = make_training(recipe, inputs, classes)
    batches = synthetic_batches(recipe, inputs, classes)
    train_step(training, batches, norms=True)  # creates the optimizer's state
    device = training.accelerator.device
    if device.type != "cuda":
        return _held(training) + _peak_on_cpu(lambda: train_step(training, batches, norms=True))
    torch.cuda.reset_peak_memory_stats(device)
    train_step(training, batches, norms=True)
    return torch.cuda.max_memory_allocated(device)


def _held(training: TrainState) -> int:
    method, state = training.method, training.optimizer.state.values()
    tensors = [*method.parameters(), *method.buffers(), *(v for s in state for v in s.values() if torch.is_tensor(v))]
    tensors += training.average.tensors.values() if training.average is not None else ()
    return sum(t.numel() * t.element_size() for t in tensors)


def _peak_on_cpu(step: Callable[[], Any]) -> int:
    """The most bytes that torch's CPU allocator handed out during ``step``, beyond those at its start."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def make_training(recipe: Recipe, inputs: Inputs, classes: int) -> TrainState:
    """Build a TrainState for the engine's train step, without data and files."""
    accelerator = make_accelerator(recipe, LaunchEnv.current())
    method, _ = build_method(recipe, inputs, classes)
    parameters = {
        "trained": sum(p.numel() for _, p in method.trainable()),
        "total": sum(p.numel() for p in method.parameters()),
    }
    model, optimizer = prepare(recipe.optim, accelerator, method)
    model.train()
    unused = cast(Any, None)
    return TrainState(
        recipe=recipe,
        accelerator=accelerator,
        method=method,
        model=model,
        optimizer=optimizer,
        train=cast(Any, SimpleNamespace(steps_per_epoch=sys.maxsize)),  # all that the step reads of it
        val=None,
        class_weights=torch.ones(classes, device=accelerator.device),
        folder=RunFolder(str(recipe.run.dir)),
        states=unused,
        monitor=unused,
        facts={},
        progress=Progress(),
        parameters=parameters,
        augmentation=augmentation_of(recipe, method.backbone),
        average=WeightAverage.of(recipe.train, method),
        stop=StopSignal(),  # never entered: signals keep their handlers
    )


def synthetic_batches(recipe: Recipe, inputs: Inputs, classes: int) -> list[Batch]:
    """The micro-batches of one global batch of noise, as loaders give them."""
    noise = torch.Generator().manual_seed(recipe.seed)
    images = recipe.train.batch_size // recipe.train.grad_accum_steps

    def shown(transform: ImageTransform) -> torch.Tensor:
        shape = (images, 3, transform.image_size, transform.image_size)
        return torch.randint(0, 256, shape, generator=noise).to(PIXELS[transform.dtype])

    def of_backbones() -> Any:
        found = tuple(map(shown, inputs.transforms))
        return found[0] if len(found) == 1 else Joined(found)

    def labels() -> torch.Tensor:
        if recipe.data.labels == "multiple":
            return torch.randint(0, 2, (images, classes), generator=noise).float()
        return torch.randint(0, classes, (images,), generator=noise)

    return [
        {
            "images": of_backbones(),
            "labels": labels(),
            "weight": torch.ones(images),
            "index": torch.arange(images),
        }
        for _ in range(recipe.train.grad_accum_steps)
    ]

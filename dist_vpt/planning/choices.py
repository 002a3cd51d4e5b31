"""Every memory policy under every strategy that a recipe can have, what each costs on a device, and the best one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter

from dist_vpt.errors import RunFailed, UserError
from dist_vpt.files import shipped_folder
from dist_vpt.planning.footprint import MemoryEstimate, PerDeviceMemory, footprint
from dist_vpt.planning.machines import Machines, size
from dist_vpt.recipe.schema import Recipe, TrainConfig
from dist_vpt.training.accelerator import unsupported_reason

# Checkpointing and offload, the fastest first (benchmarks/policies.py; offload has not been timed).
POLICIES = (
    ("none", False),
    ("mlp", False),
    ("every-2", False),
    ("budget-0.5", False),
    ("block", False),
    ("none", True),
    ("block", True),
)
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")  # the fastest first
MANY = 4096  # images at which activations exceed everything that does not grow with the batch


@dataclass(frozen=True)
class Choice:
    """A policy and a strategy, with what they cost on each device."""

    policy: str
    strategy: str
    recipe: Recipe  # with this policy
    overrides: tuple[str, ...]  # that turn the user's recipe into this one
    per_device: PerDeviceMemory
    largest: int  # largest micro-batch that fits, in images; 0: not even one
    scored: int  # images that can be evaluated at once
    fits: bool


def choices(recipe: Recipe, classes: int, machines: Machines) -> list[Choice]:
    """Every policy under every strategy that the recipe can have, the fastest first."""
    processes, eval_batch = machines.processes, recipe.train.eval_batch_size
    micro, found = micro_batch(recipe.train, processes), []
    for policy, overrides, with_policy in policies(recipe, gpus=machines.gpus):
        counted = as_counted(with_policy, gpus=machines.gpus)
        count = cache(partial(_of_images, counted, classes, machines.gpus))
        try:
            estimate = footprint(counted, classes, micro, gpus=machines.gpus)
        except UserError:  # a policy that this backbone does not support
            if not overrides:
                raise
            continue
        for name in STRATEGIES if processes > 1 else ("ddp",):
            if unsupported_reason(with_policy, name):
                continue
            per_device = estimate.on(name, processes)
            budget, others = machines.budget - per_device.held, partial(_per_device, count, name, processes)
            largest = most_images(micro, per_device, others, budget, attrgetter("working"))
            scored = most_images(eval_batch, per_device, others, budget, attrgetter("scoring"))
            fits = per_device.peak <= machines.budget
            found.append(Choice(policy, name, with_policy, overrides, per_device, largest, scored, fits))
    return sorted(found, key=lambda choice: STRATEGIES.index(choice.strategy))


def _of_images(recipe: Recipe, classes: int, gpus: bool, images: int) -> MemoryEstimate:
    """With micro-batches of ``images`` images, as many of which are evaluated at once."""
    return footprint(recipe.changed("train", eval_batch_size=images), classes, images, gpus=gpus)


def _per_device(count: Callable[[int], MemoryEstimate], name: str, processes: int, images: int) -> PerDeviceMemory:
    return count(images).on(name, processes)


def most_images(
    images: int,
    per_device: PerDeviceMemory,
    others: Callable[[int], PerDeviceMemory],
    budget: int,
    peak: Callable[[PerDeviceMemory], int],
) -> int:
    """The largest batch that fits into ``budget`` bytes, given that ``images`` images take what ``per_device`` says.

    A few images may peak as high as one, where the optimizer's copies of the trained weights are the peak. For many,
    the peak grows linearly.
    """
    many, twice = peak(others(MANY)), peak(others(2 * MANY))
    found = MANY + (budget - many) * MANY // (twice - many)
    if peak(per_device) <= budget:
        return max(images, found)
    return max(0, min(found, images - 1)) if peak(others(1)) <= budget else 0


def policies(recipe: Recipe, *, gpus: bool) -> Iterator[tuple[str, tuple[str, ...], Recipe]]:
    """Name, overrides and recipe of each memory policy that the method supports, the recipe's own among them."""
    runtime = recipe.runtime
    current = (runtime.activation_checkpointing, runtime.offload and gpus)
    pairs = [pair for pair in POLICIES if gpus or not pair[1]]
    if recipe.method.reader:
        pairs = [current]
    elif current not in pairs:
        pairs.insert(1, current)  # preferred where it fits: it was chosen for a reason
    for checkpointing, offload in pairs:
        if runtime.compile and checkpointing.startswith("budget"):
            continue  # the recipe's rules reject it
        changes = {"activation_checkpointing": checkpointing, "offload": offload}
        overrides = tuple(
            f"runtime.{key}={str(value).lower()}" for key, value in changes.items() if value != getattr(runtime, key)
        )
        yield checkpointing + " + offload" * offload, overrides, recipe.changed("runtime", **changes)


def as_counted(recipe: Recipe, *, gpus: bool) -> Recipe:
    """The recipe with the attention kernel to count for a GPU.

    Footprints are counted on a CPU, which has other kernels and resolves ``auto`` differently; fused kernels all keep
    the same tensors.
    """
    return recipe.changed("runtime", attention="sdpa") if gpus and recipe.runtime.attention != "eager" else recipe


def micro_batch(train: TrainConfig, devices: int) -> int:
    """Images that a process computes at once. Raises UserError where the batch is not divisible."""
    parts = devices * train.grad_accum_steps
    if train.batch_size % parts:
        raise UserError(
            f"train.batch_size = {train.batch_size}: must be a multiple of {parts} = {devices} devices x "
            f"{train.grad_accum_steps} accumulated micro-batches; change it or --gpus"
        )
    return train.batch_size // parts


def recommendation(recipe: Recipe, classes: int, found: Sequence[Choice], machines: Machines) -> str:
    """The recommended overrides, as text. Raises RunFailed if nothing fits."""
    batch, accumulate = recipe.train.batch_size // machines.processes, recipe.train.grad_accum_steps
    for parts in (n for n in range(accumulate, batch + 1) if batch % n == 0):
        for choice in found:
            if choice.largest >= batch // parts and choice.scored:
                eval_batch = min(choice.scored, recipe.train.eval_batch_size)
                changed = choice.recipe.changed("train", grad_accum_steps=parts, eval_batch_size=eval_batch)
                # Gradients are kept between micro-batches, which the largest micro-batch alone does not show.
                if parts != accumulate and not fits(changed, classes, choice.strategy, machines):
                    continue
                overrides = list(choice.overrides)
                overrides += [f"train.grad_accum_steps={parts}"] if parts != accumulate else []
                overrides += [f"train.eval_batch_size={eval_batch}"] * (eval_batch != recipe.train.eval_batch_size)
                return (
                    f"recommended: {' '.join(overrides) or 'the recipe as it is'}"
                    f"{launch_hint(choice.strategy, machines)}"
                )
    least = min(choice.per_device.held for choice in found)
    raise RunFailed(
        f"nothing fits: {machines}, of which weights and optimizer alone take {size(least)} in the best case; use more "
        "or larger devices, a smaller backbone, or fewer prompts"
    )


def fits(recipe: Recipe, classes: int, strategy: str, machines: Machines) -> bool:
    """Whether the recipe as it is fits, by its own footprint."""
    counted = as_counted(recipe, gpus=machines.gpus)
    images = micro_batch(recipe.train, machines.processes)
    estimate = footprint(counted, classes, images, gpus=machines.gpus)
    return estimate.on(strategy, machines.processes).peak <= machines.budget


def launch_hint(strategy: str, machines: Machines) -> str:
    """How to start a recipe on several devices, or ""."""
    if machines.processes == 1:
        return ""
    if machines.nodes == 1:
        return f"; start with {shipped_folder('launch')}/local.sh {strategy} {machines.devices}"
    return (
        f"; start with dist-vpt launch slurm ... --nodes {machines.nodes} --gpus-per-node {machines.devices} "
        f"--strategy {strategy}"
    )

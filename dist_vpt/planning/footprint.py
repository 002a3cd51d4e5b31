"""Bytes that a run holds on a device, counted without allocating the model.

B images of a micro-batch, K classes, W processes.

The training step and the scoring of a batch are run on fake tensors (shapes and dtypes, no numbers), and every
storage that they make is counted for as long as it lives: whatever a method, a kernel or a checkpointing policy does
is counted by doing it. Weights that several processes share out are then divided as the strategy does.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vpt.data.joined import Joined
from dist_vpt.data.workers import PIXELS
from dist_vpt.methods.base import Method
from dist_vpt.methods.config_readers import LinearConfig
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runtime.offload import apply_offload
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import Inputs, resolve_inputs
from dist_vpt.training.optim import build_optimizer
from dist_vpt.training.step import clip_gradients, image_losses, snapshot, squared_norms

FLOAT32 = 4  # bytes
# Of launch/accelerate/*.json, in numbers: gradients that are reduced at once, weights that ZeRO-3 holds gathered.
REDUCE_BUCKET = 50_000_000
LIVE_WEIGHTS = 50_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process that has the device to itself."""

    frozen: int  # weights that are not trained, and buffers
    trained: int  # tensors that are trained, float32
    gradients: int
    optimizer: int  # its state
    working: int  # activations and all else that a training step holds at its height, without the gradients
    height: int  # a training step's height, with the gradients that are alive then
    scoring: int  # the height of scoring a batch
    parameters: int  # numbers, frozen and trained
    trained_parameters: int
    host: int = 0  # what waits in host memory at the height of a step (runtime.offload)
    average: int = 0  # of the trained tensors (train.model_ema_decay), which ZeRO-3 alone shards
    temporaries: int = 0  # of DeepSpeed's optimizers on a GPU, which step on all tensors of a process's part at once

    def on(self, strategy: str, processes: int) -> "PerDeviceMemory":
        """The memory of each process under a strategy with this many processes."""
        w, kept = processes, self.optimizer + self.average
        if strategy == "ddp" and w == 1:
            return PerDeviceMemory(self.frozen + self.trained, 0, kept, self.height, self.scoring, self.host)
        if strategy == "ddp":  # its buckets are the gradients, and stay
            weights = self.frozen + self.trained
            return PerDeviceMemory(weights, self.gradients, kept, self.working, self.scoring, self.host)
        bucket = FLOAT32 * min(REDUCE_BUCKET, self.trained // FLOAT32)
        average = self.average // w if strategy.startswith("zero3") else self.average
        optimizer = (self.optimizer + self.trained) // w + average  # DeepSpeed steps on a copy of its part
        gradients = self.gradients if strategy == "zero1" else self.gradients // w
        working = max(self.working, self.temporaries // w)  # there are no activations during the optimizer's step
        if strategy in ("zero1", "zero2"):
            weights = self.frozen + self.trained
            return PerDeviceMemory(weights, gradients, optimizer, working + bucket, self.scoring + bucket, self.host)
        weights = self.frozen + self.trained
        gathered = min(weights, weights * LIVE_WEIGHTS // max(1, self.parameters))
        offloaded = strategy == "zero3_offload"
        return PerDeviceMemory(
            0 if offloaded else weights // w,
            gradients,
            0 if offloaded else optimizer,
            working + bucket + gathered,
            self.scoring + bucket + gathered,
            self.host + (weights // w + optimizer if offloaded else 0),
        )


@dataclass(frozen=True)
class PerDeviceMemory:
    """Bytes of one process among several."""

    weights: int
    gradients: int  # that stay between steps; a single process allocates them in each step
    optimizer: int  # its state, and the average of what is trained
    working: int  # the most that a training step holds beyond those
    scoring: int  # and scoring a batch
    host: int = 0  # in host memory, at most

    @property
    def held(self) -> int:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.held + max(self.working, self.scoring)


def footprint(recipe: Recipe, classes: int, images: int | None = None, *, gpus: bool = False) -> MemoryEstimate:
    """Count a recipe's bytes with ``images`` of a micro-batch, as the recipe has them unless given.

    ``gpus``: as on a GPU, to which batches are copied, where what is offloaded comes back a block early, pinned host
    memory comes in powers of two, and in fp16, or under DeepSpeed, torch's optimizers step on all tensors at once, with
    temporaries as large as they are. All others are fused and have none.

    Takes a second or so, and no memory of the device.
    """
    if recipe.method.fitted:  # its pass over the images is a linear head's; what it is fitted to is small beside that
        recipe = recipe.model_copy(update={"method": LinearConfig(name="linear", head=recipe.method.head)})
    inputs = resolve_inputs(recipe)
    method = weightless(recipe, inputs, classes)
    if recipe.runtime.offload:
        apply_offload(method.backbone, _PinnedCopy if gpus else _to_host)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")  # a real device's shapes: autocast wants one
        fused = gpus and recipe.runtime.precision != "fp16" and recipe.optim.name in TORCH_OPTIMIZERS
        optimizer = build_optimizer(recipe.optim, method, fused=fused)
        for group in optimizer.param_groups:
            group["foreach"] = gpus and not fused  # torch's default, and timm's
        batch = images or recipe.train.batch_size // recipe.train.grad_accum_steps
        step = _Step(recipe, inputs, method, optimizer, batch, classes, copies=gpus)
        step.train()  # the first one makes the optimizer's state
        state = sum(_nbytes(t) for t in tree_leaves([dict(s) for s in optimizer.state.values()]))
        with _Alive(step.known(), pinned=gpus) as alive:
            step.train(alive)
        with _Alive(step.known(), pinned=gpus) as scoring:
            step.score()
        trained = [p for _, p in method.trainable()]
        numbers = sum(p.numel() for p in method.parameters())
        weights = sum(_nbytes(t) for t in (*method.parameters(), *method.buffers()))
        of_trained = sum(_nbytes(p) for p in trained)
        return MemoryEstimate(
            frozen=weights - of_trained,
            trained=of_trained,
            gradients=of_trained,
            optimizer=state,
            working=alive.height_without_gradients,
            height=alive.height,
            scoring=scoring.height,
            parameters=numbers,
            trained_parameters=sum(p.numel() for p in trained),
            host=alive.host_height,
            average=0 if recipe.train.model_ema_decay is None else of_trained,
            temporaries=of_trained if gpus else 0,
        )


def weightless(recipe: Recipe, inputs: Inputs, classes: int) -> Method:
    """The recipe's method on the meta device: all shapes, and no numbers."""
    plain = {"compile": False, "offload": False}  # a compiler fuses more than is counted here, and is not waited for
    random = recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"weights": "random"}),
            "backbones": recipe.backbones
            and tuple(member.model_copy(update={"weights": "random"}) for member in recipe.backbones),
            "runtime": recipe.runtime.model_copy(update=plain),
        }
    )
    with torch.device("meta"):
        method, _ = build_method(random, inputs, classes)
    return method


def _to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Simulate ``runtime.offload`` for a tensor; the meta device represents host memory."""
    return partial(torch.empty_like, torch.empty_like(tensor, device="meta"), device=tensor.device)


class _PinnedCopy:
    """Simulates a copy in pinned memory, which is fetched before it is used."""

    def __init__(self, tensor: Tensor):
        self.bring_back = _to_host(tensor)
        self.back: Tensor | None = None

    def prefetch(self) -> None:
        self.back = self.bring_back()

    def __call__(self) -> Tensor:
        back, self.back = self.back, None
        return self.bring_back() if back is None else back


class _Step:
    """The engine's training step and scoring, with the tensors that these hold."""

    def __init__(  # noqa: PLR0917 (what a step is made of)
        self, recipe: Recipe, inputs: Inputs, method: Method, optimizer: Any, images: int, classes: int, *, copies: bool
    ):
        """``copies``: batches are copied to the device; else a step takes them as loaders give them."""
        self.recipe, self.method, self.optimizer, self.images, self.classes = recipe, method, optimizer, images, classes
        self.transforms = inputs.transforms
        self.augmented = recipe.train.mixes or recipe.data.random_erasing > 0  # on the device, to float32
        self.scored_images = max(recipe.train.eval_batch_size, recipe.data.test_crops)  # or views
        self.given = {} if copies else {n: self._batch(n) for n in (images, self.scored_images)}

    def known(self) -> list[Tensor]:
        """Tensors that exist before and after a step: parameters, buffers, optimizer state, and batches as given."""
        others = ([dict(s) for s in self.optimizer.state.values()], list(self.given.values()))
        return [*self.method.parameters(), *self.method.buffers(), *filter(torch.is_tensor, tree_leaves(others))]

    def train(self, alive: "_Alive | None" = None) -> None:
        """One optimizer step with the parts of the engine's, as on a step that is logged: the largest."""
        self.method.train()
        trained = [p for _, p in self.method.trainable()]
        hooks = [p.register_post_accumulate_grad_hook(alive.is_gradient) for p in trained] if alive else []
        for micro in range(min(2, self.recipe.train.grad_accum_steps)):  # more hold no more
            last = micro == min(2, self.recipe.train.grad_accum_steps) - 1
            loss = self._losses(self.images, augmented=self.augmented).sum()
            before = snapshot(trained) if last else []
            loss.backward()
        clip_gradients([trained], self.recipe.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        squared_norms(before, snapshot(trained))
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def score(self) -> None:
        """One batch of an evaluation."""
        self.method.eval()
        self._losses(self.scored_images)

    def _batch(self, images: int, *, augmented: bool = False) -> tuple[Tensor | Joined, Tensor]:
        """What is shown to the method, and labels."""
        shapes = [(images, 3, each.image_size, each.image_size) for each in self.transforms]
        found = [
            torch.zeros(shape, dtype=torch.float32 if augmented else PIXELS[each.dtype])
            for shape, each in zip(shapes, self.transforms, strict=True)
        ]
        multiple = self.recipe.data.labels == "multiple"
        labels = torch.zeros(images, self.classes) if multiple else torch.zeros(images, dtype=torch.long)
        return found[0] if len(found) == 1 else Joined(tuple(found)), labels

    def _losses(self, images: int, *, augmented: bool = False) -> Tensor:
        given = None if augmented else self.given.get(images)
        shown, labels = self._batch(images, augmented=augmented) if given is None else given
        return image_losses(self.method(shown), labels, self.recipe.train.label_smoothing, torch.ones(self.classes))


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages made inside it, while they live, and remembers the most."""

    def __init__(self, known: list[Tensor], *, pinned: bool):
        super().__init__()
        self.pinned = pinned
        self.now = self.height = self.gradients = self.height_without_gradients = 0
        self.host = self.host_height = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.of_gradients: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), host=tensor.device.type == "meta")
        return made

    def is_gradient(self, parameter: Tensor) -> None:
        """Called when a parameter's gradient is whole."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata not in self.of_gradients:
            self.of_gradients.add(storage._cdata)
            self.gradients += self.sizes.get(storage._cdata, 0)

    def _count(self, storage: torch.UntypedStorage, *, host: bool) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        if host:
            if self.pinned:
                self.sizes[key] = pinned_bytes(self.sizes[key])
            self.host += self.sizes[key]
            self.host_height = max(self.host_height, self.host)
            weakref.finalize(storage, self._gone_from_host, key)
            return
        self.now += self.sizes[key]
        self.height = max(self.height, self.now)
        self.height_without_gradients = max(self.height_without_gradients, self.now - self.gradients)
        weakref.finalize(storage, self._gone, key)

    def _gone_from_host(self, key: int) -> None:
        self.host -= self.sizes.pop(key)

    def _gone(self, key: int) -> None:
        size = self.sizes.pop(key)
        self.now -= size
        if key in self.of_gradients:
            self.of_gradients.remove(key)
            self.gradients -= size


def pinned_bytes(size: int) -> int:
    """What torch's allocator of pinned host memory takes for ``size`` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _nbytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

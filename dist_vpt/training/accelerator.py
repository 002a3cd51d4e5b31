"""One process or many: the Accelerator of a recipe, and a method wrapped for DDP or a DeepSpeed ZeRO stage."""

import atexit
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from torch import distributed, nn

from dist_vpt.distributed.collectives import RankAccelerator, raise_on_any_rank
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.rank_log import prints_as_messages
from dist_vpt.distributed.rank_status import RankStatus
from dist_vpt.distributed.rendezvous import MARGIN_SECONDS, rendezvous
from dist_vpt.errors import UserError
from dist_vpt.files import shipped_folder
from dist_vpt.methods.base import Method
from dist_vpt.recipe.optim_section import TORCH_OPTIMIZERS
from dist_vpt.recipe.schema import OptimConfig, Recipe
from dist_vpt.recipe.trackers import require_trackers
from dist_vpt.runtime.allocator import keep_freed_memory
from dist_vpt.training.optim import build_optimizer
from dist_vpt.training.zero_optimizer import fit_into_zero3, unsupported_optimizer, unsupported_sharding

# Set by the recipe, so a DeepSpeed configuration must not have them.
SET_BY_RECIPE = ("optimizer", "scheduler", "bf16", "fp16", "amp", "torch_autocast")
NOT_ON_CPU = (
    "runtime.device = cpu: Accelerate switches DeepSpeed off with it; set runtime.device=auto (without a GPU that is "
    "the CPU), or start with the ddp strategy"
)


_keeps_process_group = False


def keep_process_group() -> None:
    """Keep the process group of the next run for all later ones of this program, until it ends.

    Gloo may connect the processes of a second group to addresses of the first, which the launcher's store still holds.
    """
    global _keeps_process_group  # noqa: PLW0603 (the process group is the program's, too)
    _keeps_process_group = True


def reset_accelerate() -> None:
    """Forget the state that Accelerate keeps for a process: a run of another device or precision needs its own."""
    AcceleratorState._reset_state(reset_partial_state=not _keeps_process_group)
    GradientState._reset_state()
    if not _keeps_process_group:
        PartialState._reset_state()


def leave_accelerate_as_it_is(leaving: ExitStack) -> None:
    """At the end, forget the state of this run; keep that of a program that has an Accelerator of its own."""
    if not AcceleratorState._shared_state:
        leaving.callback(reset_accelerate)
        return
    kept = dict(GradientState._shared_state)
    leaving.callback(GradientState._shared_state.update, kept)


def _destroy_process_group() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def make_accelerator(recipe: Recipe, launch: LaunchEnv, status: RankStatus | None = None) -> RankAccelerator:
    """An Accelerator for this process, its DeepSpeed configuration filled in from the recipe."""
    cpu = recipe.runtime.device == "cpu" or not torch.accelerator.is_available()
    if recipe.runtime.precision == "fp16" and cpu:
        raise UserError("runtime.precision = fp16: needs a GPU (gradients are scaled there); use bf16 or fp32 on a CPU")
    if launch.world_size > 1 and not launch.launched:  # here Accelerate 1.12 raises a ValueError
        raise _unseen(launch, 1)
    # Named explicitly on CPU: without it Accelerate sees one process where DeepSpeed sees all of them.
    backend = "gloo" if cpu and launch.launched else None
    with rendezvous(launch, recipe.run.timeout_minutes), prints_as_messages("DeepSpeed"):
        accelerator = RankAccelerator(
            launch,
            status,
            cpu=recipe.runtime.device == "cpu",
            # Frozen weights are held in the recipe's precision and need no autocast; fp16 needs its gradient scaler.
            mixed_precision="fp16" if recipe.runtime.precision == "fp16" else "no",
            # As a plugin: a variable of the launcher overrides the number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=recipe.train.grad_accum_steps),
            project_dir=recipe.run.dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(
                    backend=backend, timeout=timedelta(minutes=recipe.run.timeout_minutes, seconds=MARGIN_SECONDS)
                ),
                AutocastKwargs(enabled=False),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    require_trackers(recipe.run.trackers)
    if accelerator.num_processes != launch.world_size:
        raise _unseen(launch, accelerator.num_processes)
    if accelerator.state.deepspeed_plugin is not None:
        _fill_deepspeed(accelerator, recipe)
    elif launch.deepspeed:
        raise UserError(NOT_ON_CPU)
    if cpu and strategy_name(accelerator) != "zero3":
        keep_freed_memory()
    if recipe.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return accelerator


def _refuse_two_precisions(accelerator: RankAccelerator, recipe: Recipe) -> None:
    """Raise a UserError on all processes where runtime.precision=auto came to another one on another machine."""
    found: list[str] = gather_object([recipe.runtime.precision])
    if len(set(found)) > 1:
        other = next(rank for rank, precision in enumerate(found) if precision != found[0])
        refused = UserError(
            f"runtime.precision = auto: is {found[0]} for process 0 and {found[other]} for process {other}, whose "
            "machine is another; set runtime.precision"
        )
        refused.shared = True
        raise refused


def _unseen(launch: LaunchEnv, seen: int) -> UserError:
    return UserError(
        f"{launch.world_size} processes were started, but Accelerate sees {seen}; "
        f"start them with `accelerate launch --config_file` and a file of {shipped_folder('launch')}/accelerate"
    )


def launcher_notes(launch: LaunchEnv, recipe: Recipe) -> list[str]:
    """A line for each setting of ``accelerate launch`` that differs from the recipe's, which prevails."""
    settings = {
        "mixed_precision": (launch.mixed_precision, "runtime.precision", recipe.runtime.precision),
        "gradient_accumulation_steps": (
            launch.grad_accum_steps,
            "train.grad_accum_steps",
            recipe.train.grad_accum_steps,
        ),
        "gradient_clipping": (launch.gradient_clipping, "optim.clip_norm", recipe.optim.clip_norm),
    }
    return [
        f"note: {name} = {given} of accelerate launch is not used: {key} = {own} of the recipe is"
        for name, (given, key, own) in settings.items()
        if given not in (None, "no", "none", "auto", str(own), f"{own:g}" if isinstance(own, float) else "")
        and not (name == "gradient_accumulation_steps" and given == "1")  # the launcher's default
    ]


def strategy_name(accelerator: RankAccelerator) -> str:
    """single, ddp, or zero0 to zero3."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    return "ddp" if accelerator.num_processes > 1 else "single"


def prepare(optim: OptimConfig, accelerator: RankAccelerator, method: Method) -> tuple[nn.Module, Any]:
    """The method wrapped for the strategy, and an optimizer over its trainable parameters."""
    frozen = {name: parameter for name, parameter in method.named_parameters() if not parameter.requires_grad}
    # Every process reads the same frozen weights from the same file, so they need no broadcast at all. Buffers are
    # constants; with none left to DDP, it broadcasts none before a step either.
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        method, [*frozen, *(name for name, _ in method.named_buffers())]
    )
    for parameter in frozen.values():
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed does not broadcast it then
    model, optimizer = accelerator.prepare(
        method, build_optimizer(optim, method, fused=steps_are_fused(accelerator, optim))
    )
    fit_into_zero3(optimizer.optimizer, optim)
    for parameter in frozen.values():
        del parameter.ds_optim_param  # type: ignore[attr-defined]
    return model, optimizer


def steps_are_fused(accelerator: RankAccelerator, optim: OptimConfig) -> bool:
    """Whether the optimizer uses torch's fused kernels, which timm's have not.

    On a GPU, which works on while nobody waits for a number. A CPU would gain nothing, and there a run rounds as a
    trial does (trial_stack.py). Not beside a gradient scale: where the first step of SGD overflows, the fused kernel
    leaves momentum as the allocator gave it, and takes it for real in the next step. Not under DeepSpeed, whose
    optimizers around torch's step by themselves and know no ``found_inf``.
    """
    alone = accelerator.scaler is None and accelerator.state.deepspeed_plugin is None
    return alone and accelerator.device.type == "cuda" and optim.name in TORCH_OPTIMIZERS


def unsupported_reason(recipe: Recipe, name: str) -> str:
    """Why a recipe cannot run under a strategy, with the fix, or "".

    ``name``: as strategy_name gives it, or of a file in launch/accelerate.
    """
    runtime, zero, zero3 = recipe.runtime, name.startswith("zero"), name.startswith("zero3")
    reasons = {
        NOT_ON_CPU: zero and runtime.device == "cpu",
        "runtime.precision = fp16: DeepSpeed would hold what is trained in fp16 too; use bf16 or fp32, or DDP": zero
        and runtime.precision == "fp16",
        unsupported_optimizer(recipe.optim): zero and name != "zero0",
        f"method.name = {recipe.method.name}: reads the weights inside the blocks, which ZeRO-3 gathers only while "
        "a block itself is called; start with the ddp strategy (or zero1, zero2)": zero3 and recipe.method.reads_blocks,
        f"method.name = {recipe.method.name}: computes with its trained layers of all trials at once, which ZeRO-3 "
        "gathers only while a layer itself is called; start with the ddp strategy (or zero1, zero2)": zero3
        and recipe.method.stacks_layers,
        f"runtime.activation_checkpointing = {runtime.activation_checkpointing}: ZeRO-3 gathers weights at other "
        "moments in backward than in forward, and torch's selective checkpointing takes that for other arithmetic; "
        "use mlp, block or every-N, or start with the ddp strategy": zero3
        and runtime.activation_checkpointing.startswith("budget"),
        "runtime.compile = true: ZeRO-3 gathers weights from hooks inside the blocks, which a compiler cannot "
        "follow; use compile=false, or start with the ddp strategy": zero3 and runtime.compile,
    }
    return next((reason for reason, holds in reasons.items() if holds and reason), "")


def frozen_bytes(method: Method) -> tuple[int, int]:
    """Bytes of frozen weights that this process holds now (under ZeRO-3 shards and gathered weights), and of all."""
    held = total = 0
    for parameter in method.parameters():
        if not parameter.requires_grad:
            shard = getattr(parameter, "ds_tensor", None)
            held += parameter.nbytes + (0 if shard is None else shard.nbytes)
            total += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return held, total


def _fill_deepspeed(accelerator: RankAccelerator, recipe: Recipe) -> None:
    """Fill DeepSpeed's configuration in from the recipe. Raises UserError for an entry that contradicts it."""
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    sharding = unsupported_sharding(recipe, config.get("zero_optimization", {}))
    if reason := unsupported_reason(recipe, strategy_name(accelerator)) or sharding:
        error = UserError(reason)
        error.shared = True  # recipe and configuration are the same on every process
        raise error
    for key in SET_BY_RECIPE:
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("enabled") in (False, "auto")):
            raise UserError(
                f"DeepSpeed configuration: {key} = {value}: is set by the recipe (optim, runtime.precision); remove it"
            )
    micro = recipe.train.batch_size // (accelerator.num_processes * recipe.train.grad_accum_steps)
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = recipe.train.grad_accum_steps
    config["train_batch_size"] = micro * accelerator.num_processes * recipe.train.grad_accum_steps
    # "auto" would become 1.0, and Accelerate's own clipping does nothing under DeepSpeed.
    config["gradient_clipping"] = recipe.optim.clip_norm or 0.0
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False  # its own Adam has other numerics than the recipe's optimizer
    config.setdefault("steps_per_print", 10**9)


Made = TypeVar("Made")


def capture_user_error(launch: LaunchEnv, make: Callable[[], Made]) -> tuple[Made | None, UserError | None]:
    """Call ``make``; with several processes, return its UserError for ``init_accelerator`` to raise on all of them."""
    try:
        return make(), None
    except UserError as error:
        if launch.world_size == 1:
            raise
        return None, error


def init_accelerator(
    recipe: Recipe, launch: LaunchEnv, status: RankStatus, error: UserError | None, leaving: ExitStack
) -> RankAccelerator:
    """The Accelerator of all processes. Raises, on all of them, the first ``error`` that one has captured before."""
    # For the next run of this process, such as a suite's.
    leaving.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    within = distributed.is_initialized()  # a sweep keeps its process group for its next run
    leave_accelerate_as_it_is(leaving)
    try:
        accelerator = make_accelerator(recipe, launch, status)
        if not within and _keeps_process_group:
            atexit.register(_destroy_process_group)
        elif not within:
            leaving.callback(accelerator.end_training)
        raise_on_any_rank(accelerator, error)
        _refuse_two_precisions(accelerator, recipe)
    except (UserError, RuntimeError) as failure:  # such as a collective call that another process never joins
        if error is None or (isinstance(failure, UserError) and failure.shared):
            raise
        raise error from failure
    except ValueError as clash:
        if "already been initialized" not in str(clash):
            raise
        raise UserError(
            "this program has an Accelerator of another device or precision than the run: make it after the run, or "
            "give it the run's device and mixed_precision='no'"
        ) from clash
    return accelerator

"""What one process of several sends to the others in a training step, and how long the step takes.

    python benchmarks/traffic.py [RECIPE...] a.b=c ... [--repeats N] [--classes K]     below a launcher

W processes, n bytes of a whole tensor. benchmarks/scaling.py starts this under each strategy; the step is the engine's
own, on synthetic images. The last line of the output is one JSON object:

- ``step_bytes``: payload that the process sends in a training step, counted collective by collective, each as the
  algorithm that sends the least in every process alike (a ring): all-reduce 2 (W - 1) / W n; reduce-scatter and
  all-gather (W - 1) / W n each, so that the two together are an all-reduce; broadcast and reduce n in every process but
  one, (W - 1) / W n on the mean. Every call that reaches torch's process groups is seen, from Python or C++.
- ``start_bytes``: the same, from the making of the process group to the first step.
- ``calls``: collectives in a training step, by name.
- ``wire_bytes``: what the operating system says that the process's TCP connections to the others sent during that
  step, headers of gloo's messages included; null where the collectives use something else than TCP.
- ``step_ms``: the fastest of ``--repeats`` steps, without counting.
- ``collectives_ms``: of each kind of collective alone, by the bytes of its whole tensor, the fastest of several;
  ``gather`` is an all-gather as ZeRO-3 does it, into new memory and from there into new memory again.
"""

import argparse
import json
import os
import socket
import stat
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))  # as when this file is the script
from step import LR, count, rounded, synchronize

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.planning.measure import make_training, synthetic_batches
from dist_vpt.recipe.loading import load_recipe, split_arguments
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.accelerator import strategy_name
from dist_vpt.training.engine import train_step
from dist_vpt.training.inputs import resolve_inputs

# Collective -> which argument holds the whole tensor, and how often (W - 1) / W of it is sent.
COLLECTIVES = {
    "allreduce_": (0, 2),
    "allreduce_coalesced_": (0, 2),
    "reduce_scatter_": (1, 1),
    "_reduce_scatter_base_": (1, 1),
    "reduce_scatter_tensor_coalesced_": (1, 1),
    "allgather_": (0, 1),
    "_allgather_base_": (0, 1),
    "allgather_into_tensor_coalesced_": (0, 1),
    "broadcast_": (0, 1),
    "reduce_": (0, 1),
    "barrier": (0, 0),
}
BYTES_SENT, BYTES_SENT_AGAIN = 200, 208  # offsets in Linux's struct tcp_info
GRADIENT = 4  # bytes: what is trained is float32
FEW, MANY = 4, 8 * 2**20  # bytes of each process in collectives timed for themselves
WARM_UP = 3  # steps: DDP orders its buckets by the first, ZeRO-3 learns the order of the modules from two


class Sent(TorchDispatchMode):
    """Counts what the collectives called inside it send, in bytes of this process, and the calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            where, times = COLLECTIVES[name]  # an unknown one must not go uncounted
            size = sum(tensor.nbytes for tensor in tree_leaves(args[where]) if isinstance(tensor, Tensor))
            world = dist.get_world_size()
            self.bytes += times * (world - 1) / world * size
            self.calls[name.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def measure(recipe: Recipe, *, classes: int, repeats: int) -> dict[str, Any]:
    """All numbers of this process. A collective call."""
    optim = recipe.optim.model_copy(update={"lr": LR, "scale_lr": False})
    recipe = recipe.model_copy(update={"optim": optim})
    inputs = resolve_inputs(recipe)
    with Sent() as start:
        training = make_training(recipe, inputs, classes)
    accelerator = training.accelerator
    processes, rank = accelerator.num_processes, accelerator.process_index
    each = recipe.train.batch_size // processes // recipe.train.grad_accum_steps
    batches: list[Any] = [
        {name: value[rank * each : (rank + 1) * each] for name, value in cast(dict[str, Tensor], batch).items()}
        for batch in synthetic_batches(recipe, inputs, classes)
    ]

    def step() -> float:
        synchronize(accelerator.device)
        began = time.perf_counter()
        train_step(training, batches, norms=False)
        synchronize(accelerator.device)
        training.progress.step += 1
        return time.perf_counter() - began

    for _ in range(WARM_UP):
        step()
    before = wire_bytes()
    with Sent() as sent:
        step()
    after = wire_bytes()
    fastest = min(step() for _ in range(repeats)) if repeats else None
    on_tcp = processes > 1 and dist.get_backend() == "gloo" and before is not None and after is not None
    return {
        "strategy": strategy_name(accelerator),
        "processes": processes,
        "rank": rank,
        "step_bytes": round(sent.bytes),
        "start_bytes": round(start.bytes),
        "calls": dict(sent.calls),
        "wire_bytes": after - before if on_tcp else None,  # type: ignore[operator]
        "step_ms": None if fastest is None else rounded(fastest * 1e3),
        "collectives_ms": time_collectives(accelerator.device) if processes > 1 else None,
        "gradient_bytes": GRADIENT * training.parameters["trained"],
        "parameters": training.parameters,
    }


def time_collectives(device: torch.device, repeats: int = 10) -> dict[str, dict[int, float]]:
    """Milliseconds of each kind by the bytes of its whole tensor, the fastest of ``repeats``. A collective call."""
    world, rank = dist.get_world_size(), dist.get_rank()
    found: dict[str, dict[int, float]] = {}
    for size in (FEW, MANY):
        part, whole = torch.ones(size // 4, device=device), torch.ones(world * size // 4, device=device)

        def gather(part: Tensor = part) -> None:
            flat = part.new_empty(world * len(part))
            parts = flat.chunk(world)
            torch.cat([part], out=parts[rank])
            dist.all_gather_into_tensor(flat, parts[rank])
            torch.cat(parts)

        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": partial(dist.all_reduce, whole),
            "reduce": partial(dist.reduce, whole, 0),
            "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
            "all_gather": partial(dist.all_gather_into_tensor, whole, part),
            "gather": gather,
        }
        for name, call in calls.items():
            fastest = min(_seconds(call, device) for _ in range(repeats))
            found.setdefault(name, {})[whole.nbytes] = rounded(1e3 * fastest)
    return found


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    dist.barrier()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def wire_bytes() -> int | None:
    """Bytes sent so far by the TCP connections of this process, but for those to the store where processes meet.

    None where the system does not tell (it is not Linux).
    """
    if not sys.platform.startswith("linux"):
        return None
    meeting, sent = int(os.environ.get("MASTER_PORT", "0")), 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.type != socket.SOCK_STREAM or one.family not in {socket.AF_INET, socket.AF_INET6}:
                    continue
                if meeting in {one.getsockname()[1], one.getpeername()[1]}:
                    continue
                told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # the folder's own entry, a listening socket, or one that has gone
            continue
        if len(told) < BYTES_SENT_AGAIN + 8:
            return None
        sent += struct.unpack_from("Q", told, BYTES_SENT)[0] - struct.unpack_from("Q", told, BYTES_SENT_AGAIN)[0]
    return sent


def main(words: list[str] | None = None) -> int:
    """Measure one recipe in this process and print its JSON; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/traffic.py", description="What a process sends in a training step, below a launcher."
    )
    parser.add_argument("recipe", nargs="*", metavar="RECIPE|a.b=c", help="recipe files, and a.b=c overrides")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="timed steps (default 3)")
    parser.add_argument("--classes", type=count, default=100, metavar="K", help="classes of the head (default 100)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(words)

    def call() -> None:
        recipe, _ = resolve_precision(load_recipe(*split_arguments(arguments.recipe)))
        print(json.dumps(measure(recipe, classes=arguments.classes, repeats=arguments.repeats)), flush=True)

    return run_with_exit_code(call, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())

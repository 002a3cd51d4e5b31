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
- ``allreduce_ms``: of an all-reduce of so many bytes alone, the fastest of several.
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
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))  # as when this file is the script
from step import LR, count, rounded, synchronise

from dist_vpt.backbones.build import describe
from dist_vpt.cli import guarded
from dist_vpt.engine import train_step
from dist_vpt.plan import make_training, synthetic_batches
from dist_vpt.recipe import Recipe, load_recipe, split_arguments
from dist_vpt.strategy import strategy

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
PLAIN = (12, 16 * 2**20)  # bytes of all-reduces timed for themselves: what the engine sums in each step, and a lot
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
    wants = describe(recipe.backbone)
    with Sent() as start:
        training = make_training(recipe, wants, classes)
    accelerator = training.accelerator
    processes, rank = accelerator.num_processes, accelerator.process_index
    each = recipe.train.batch_size // processes // recipe.train.accumulate
    batches: list[Any] = [
        {name: value[rank * each : (rank + 1) * each] for name, value in cast(dict[str, Tensor], batch).items()}
        for batch in synthetic_batches(recipe, wants, classes)
    ]

    def step() -> float:
        synchronise(accelerator.device)
        began = time.perf_counter()
        train_step(training, batches, norms=False)
        synchronise(accelerator.device)
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
        "strategy": strategy(accelerator),
        "processes": processes,
        "rank": rank,
        "step_bytes": round(sent.bytes),
        "start_bytes": round(start.bytes),
        "calls": dict(sent.calls),
        "wire_bytes": after - before if on_tcp else None,  # type: ignore[operator]
        "step_ms": None if fastest is None else rounded(fastest * 1e3),
        "allreduce_ms": {size: rounded(1e3 * time_allreduce(size, accelerator.device)) for size in PLAIN}
        if processes > 1
        else None,
        "gradient_bytes": GRADIENT * training.parameters["trained"],
        "parameters": training.parameters,
    }


def time_allreduce(size: int, device: torch.device, repeats: int = 10) -> float:
    """Seconds of an all-reduce of so many bytes, the fastest of ``repeats``. A collective call."""
    numbers, fastest = torch.ones(size // 4, device=device), float("inf")
    for _ in range(repeats):
        dist.barrier()
        synchronise(device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        synchronise(device)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


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
        recipe = load_recipe(*split_arguments(arguments.recipe))
        print(json.dumps(measure(recipe, classes=arguments.classes, repeats=arguments.repeats)), flush=True)

    return guarded(call, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())

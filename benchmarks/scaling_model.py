"""A model of step times for 1 to 1,024 GPUs: what a method exchanges under a strategy, and how long a network takes.

W GPUs, G of them in a node, n bytes of a whole tensor. The model is described in scaling.py.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from step import model_flops, rounded

from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.training.components import build_method
from dist_vpt.training.inputs import resolve_inputs

ROOT = Path(__file__).parents[1]
METHODS = {
    "linear": ["method.name=linear"],
    "vqt": ["method.name=vqt"],
    "vpt_deep": ["method.name=vpt", "method.prompts=50"],
    "full": ["method.name=full"],
}
BACKBONES = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")
GPUS = tuple(2**power for power in range(11))
BUCKET = 25 * 2**20  # bytes, of torch's DDP
SHARDING = json.loads((ROOT / "launch" / "accelerate" / "zero3.json").read_text())["zero_optimization"]
SMALL = SHARDING["stage3_param_persistence_threshold"]  # numbers of a tensor that ZeRO-3 keeps whole
LIVE = SHARDING["stage3_max_live_parameters"]  # numbers that may stay gathered from forward to backward
REDUCED = SHARDING["reduce_bucket_size"]  # numbers, of ZeRO 1 and 2 too
# Collectives, and how many passes of a ring each is; a gather is ZeRO-3's all-gather, with its copies.
TIMES = {"all_reduce": 2, "reduce": 1, "reduce_scatter": 1, "all_gather": 1, "gather": 1}
GRADIENT = 4  # bytes: what is trained is float32
ENGINE = 12  # bytes of what the engine sums
PAPER = ("runtime.precision=bf16", "runtime.attention=sdpa")


@dataclass(frozen=True)
class Network:
    """Bytes and seconds: what links the GPUs of a node, and a node with the others."""

    gpus_per_node: int
    inside: float  # bytes a second that each GPU sends
    between: float  # bytes a second that each node sends
    inside_latency: float  # seconds, of a message
    between_latency: float

    def moving(self, size: float, gpus: int) -> float:
        """Seconds that the bytes of a reduce-scatter or an all-gather take; of an all-reduce twice that."""
        near, nodes = self._shape(gpus)
        return (near - 1) / near * size / self.inside + (nodes - 1) / nodes * size / self.between

    def waiting(self, gpus: int) -> float:
        """Seconds that the smallest of them takes."""
        near, nodes = self._shape(gpus)
        return (near - 1) * self.inside_latency + math.ceil(math.log2(nodes)) * self.between_latency

    def _shape(self, gpus: int) -> tuple[int, int]:
        near = min(gpus, self.gpus_per_node)
        return near, math.ceil(gpus / near)


@dataclass(frozen=True)
class Work:
    """What a method on a backbone computes and may have to exchange."""

    trained: int  # bytes of gradients
    sharded: int  # bytes of weights that ZeRO-3 shards, and their numbers
    sharded_numbers: int
    whole: int  # bytes of small tensors, which it gathers after each update, and how many they are
    whole_tensors: int
    blocks: int
    reader: bool

    def passes(self, strategy: str, gpus: int) -> dict[str, tuple[float, int]]:
        """Bytes of whole tensors that go through each kind of collective in a step, and how many of it there are."""
        if gpus == 1:
            return {}
        if strategy in ("ddp", "zero0"):
            return {"all_reduce": (self.trained + 2 * ENGINE, 2 + math.ceil(self.trained / BUCKET))}
        sums = {"all_reduce": (2 * ENGINE, 4)}
        if strategy in ("zero1", "zero2"):
            reduces = gpus + math.ceil(self.trained / GRADIENT / REDUCED) - 1
            return sums | {"reduce": (self.trained, reduces), "all_gather": (self.trained, 1)}
        again = (
            0.0 if self.reader else max(0.0, 1 - LIVE / max(1, self.sharded_numbers))
        )  # of the weights, for backward
        gathers = self.whole_tensors + round(2 * self.blocks * (1 + again))
        gathered = self.sharded * (1 + again) + self.whole
        return sums | {"reduce_scatter": (self.trained, 1), "gather": (gathered, gathers)}


def sent(passes: dict[str, tuple[float, int]]) -> tuple[float, int]:
    """Bytes that pass as in a reduce-scatter or an all-gather, and how often: an all-reduce is both."""
    return tuple(sum(TIMES[kind] * each[place] for kind, each in passes.items()) for place in (0, 1))  # type: ignore[return-value]


def taken(plain: dict[str, float], size: float, calls: int) -> float:
    """Milliseconds of so many collectives of one kind on ``size`` bytes in all: a line through few and many bytes."""
    (few, short), (many, long) = sorted((int(bytes_), ms) for bytes_, ms in plain.items())
    rate = max(0.0, long - short) / (many - few)
    return calls * max(0.0, short - rate * few) + rate * size


def work(recipe: Recipe, classes: int) -> Work:
    """Counted on a model without numbers."""
    with torch.device("meta"):
        method, _ = build_method(recipe, resolve_inputs(recipe), classes)
    parameters = list(method.parameters())
    sharded, whole = ([p for p in parameters if (p.numel() > SMALL) == large] for large in (True, False))
    return Work(
        trained=GRADIENT * sum(p.numel() for p in parameters if p.requires_grad),
        sharded=sum(p.nbytes for p in sharded),
        sharded_numbers=sum(p.numel() for p in sharded),
        whole=sum(p.nbytes for p in whole),
        whole_tensors=len(whole),
        blocks=len(method.backbone.blocks),
        reader=recipe.method.reader,
    )


def on_paper(arguments: argparse.Namespace) -> dict[str, Any]:
    """Step times of 1 to 1,024 GPUs, by method, backbone and strategy; prints the tables."""
    network = Network(
        arguments.gpus_per_node,
        arguments.inside * 1e9,
        arguments.between * 1e9,
        arguments.inside_latency * 1e-6,
        arguments.between_latency * 1e-6,
    )
    rows: dict[str, list[dict[str, Any]]] = {"weak": [], "strong": []}
    for backbone in BACKBONES:
        for method, overrides in METHODS.items():
            recipe = load_recipe([], [f"backbone.name={backbone}", "backbone.weights=random", *overrides, *PAPER])
            flops, has = (
                model_flops(recipe, resolve_inputs(recipe), arguments.classes),
                work(recipe, arguments.classes),
            )
            image = flops / (arguments.tflops * 1e12)
            for strategy in paper_strategies(method):
                for kind, found in rows.items():
                    images = {w: arguments.batch if kind == "weak" else arguments.global_batch / w for w in GPUS}
                    computing = {w: arguments.overhead_ms / 1e3 + images[w] * image for w in GPUS}
                    found.append(
                        {"backbone": backbone, "method": method, "strategy": strategy}
                        | row(has, strategy, network, computing, weak=kind == "weak")
                    )
    for kind, found in rows.items():
        for line in paper_table(kind, found, arguments):
            print(line)
    return {
        "network": asdict(network),
        "tflops": arguments.tflops,
        "overhead_ms": arguments.overhead_ms,
        "batch": arguments.batch,
        "global_batch": arguments.global_batch,
        "precision": "bf16",
        "image_size": 224,
        **rows,
    }


def paper_strategies(method: str) -> tuple[str, ...]:
    """Those that are worth a row: ZeRO 1 and 2 have next to nothing to shard where little is trained."""
    return {"vqt": ("ddp",), "full": ("ddp", "zero2", "zero3")}.get(method, ("ddp", "zero3"))


def row(has: Work, strategy: str, network: Network, computing: dict[int, float], *, weak: bool) -> dict[str, Any]:
    """Step times by number of GPUs, and where the efficiency falls below 90 % and 50 %."""
    plain, hidden = {}, {}
    for w, compute in computing.items():
        size, calls = sent(has.passes(strategy, w))
        moving, waiting = network.moving(size, w), calls * network.waiting(w)
        plain[w] = compute + moving + waiting
        hidden[w] = max(compute, moving) + waiting
    return {
        "step_ms": {str(w): rounded(1e3 * seconds) for w, seconds in plain.items()},
        "bytes_of_a_gpu": {str(w): round((w - 1) / w * sent(has.passes(strategy, w))[0]) for w in computing},
        "stops_at": stops(plain, weak=weak),
        "hidden_stops_at": stops(hidden, weak=weak),
    }


def stops(seconds: dict[int, float], *, weak: bool) -> dict[str, int]:
    """The number of GPUs up to which the efficiency is at least 90 % and 50 %."""
    found = {}
    for share in (0.9, 0.5):
        last = 1
        for w, one in seconds.items():
            if seconds[1] / (one if weak else w * one) < share:
                break
            last = w
        found[f"{share:.0%}"] = last
    return found


def paper_table(kind: str, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[str]:
    """Lines; step times in milliseconds, then the GPUs up to which the efficiency is at least 90 % and 50 %."""
    fixed = f"{arguments.batch} images a GPU" if kind == "weak" else f"{arguments.global_batch} images a step"
    yield f"\n{kind} scaling, {fixed}: ms of a step, nothing overlapped; GPUs to 90 % and 50 % efficiency (all hidden)"
    yield f"{'backbone':<9}{'method':<9}{'':<6}" + "".join(f"{w:>7,}" for w in GPUS) + f"{'90 %':>15}{'50 %':>15}"
    for one in rows:
        names = one["backbone"].removeprefix("vit_").partition("_")[0]
        times = "".join(f"{one['step_ms'][str(w)]:>7,.0f}" for w in GPUS)
        ends = "".join(f"{f'{at:,} ({hidden:,})':>15}" for at, hidden in _pairs(one))
        yield f"{names:<9}{one['method']:<9}{one['strategy']:<6}{times}{ends}"


def _pairs(one: dict[str, Any]) -> Iterator[tuple[int, int]]:
    return zip(one["stops_at"].values(), one["hidden_stops_at"].values(), strict=True)

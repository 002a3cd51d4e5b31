"""Steps of several processes, measured on this machine, and a model of step times on paper for 1 to 1,024 GPUs.

    python benchmarks/scaling.py [a.b=c ...] [--methods M ...] [--strategies S ...] [--processes N ...] [--images B]
        [--turns N] [--repeats N] [--paper] [the network's parameters] [--out DIR]

W GPUs (or processes), G of them in a node, n bytes of a whole tensor.

**Measured**: every method under every strategy on W processes by benchmarks/traffic.py, ``--images`` of a process,
so that the work of each stays the same: bytes counted, and the fastest step of all turns (in each turn every one is
started once). ``apart`` are W single processes at the same time that exchange nothing; under ZeRO one process is
measured too, which exchanges nothing either and pays for the engine.

**On paper** a step is compute + exchange. Compute: the operations of forward and backward (``model_flops`` of step.py)
times the images of a GPU, over ``--tflops``, and ``--overhead-ms`` that a step costs with any batch. Exchange: a
reduce-scatter or an all-gather passes (G - 1) / G n over a node's links and (M - 1) / M n over the network of each of M
nodes, and takes G - 1 latencies of the one and log2 M of the other; an all-reduce is both. Who exchanges what:

- ddp, zero0: an all-reduce of the trained tensors' gradients, in buckets of 25 MiB.
- zero1, zero2: gradients reduced to the process that keeps them, W of them in turn; what it updates is gathered.
- zero3: weights gathered for forward, and for backward what forward did not leave (50 million numbers may stay); a
  reader has no such backward. Gradients reduce-scattered. About two gathers a block, and one for each small tensor
  that stays whole.
- all: two sums of a few numbers that the engine makes, two more under ZeRO.

``weak``: the batch of each GPU is fixed (``--batch``); efficiency is T(1) / T(W). ``strong``: the global batch is fixed
(``--global-batch``); efficiency is T(1) / (W T(W)). Step times are given as if nothing overlapped. ``stops_at`` is the
number of GPUs up to which the efficiency is at least 90 % and 50 %; ``hidden_stops_at`` the same if all that moves
bytes were hidden behind the computing, and only latencies were not. The truth lies between the two.

**Checked**: the model's bytes and step times beside the measured ones, with the relative error. For this what a
collective takes is this machine's, a + b n for each kind from plain ones of a few bytes and of many MiB, and compute is
the step time of ``apart``, with what the strategy's engine adds to the step of one process alone (which updates all
that ZeRO shares among several); nothing is fitted to the steps that are compared.

The last line of the output is one JSON object, which also goes to a file in ``--out``.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import socket
from typing import Any

import torch
from step import RESULTS, count, machine, model_flops, name_on_device, rounded

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.errors import RunFailed
from dist_vpt.files import write_atomically
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.training.components import build_method, resolve_inputs

ROOT = Path(__file__).parents[1]
TRAFFIC = Path(__file__).parent / "traffic.py"
METHODS = {
    "linear": ["method.name=linear"],
    "vqt": ["method.name=vqt"],
    "vpt_deep": ["method.name=vpt", "method.prompts=50"],
    "full": ["method.name=full"],
}
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")
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


def main(words: list[str] | None = None) -> int:
    """Measure, model, print tables and JSON, write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(words)

    def call() -> None:
        result = benchmark(arguments)
        file = Path(arguments.out) / file_name(result)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(result, indent=1) + "\n")
        print(f"written to {file}")
        print(json.dumps(result), flush=True)

    return run_with_exit_code(call, debug=arguments.debug)


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers, printed as they come."""
    load = round(os.getloadavg()[0], 1)
    device = (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
        "cpu"
    )
    recipes = {
        name: load_recipe([], ["backbone.weights=random", *METHODS[name], *arguments.overrides])
        for name in arguments.methods
    }
    first = next(iter(recipes.values()))
    measured: list[dict[str, Any]] = []
    if not arguments.paper:
        found = measure(recipes, arguments)
        measured = check(found, {name: work(recipe, arguments.classes) for name, recipe in recipes.items()})
        for line in measured_table(measured):
            print(line)
    return {
        "measured": measured,
        "paper": on_paper(arguments),
        "backbone": first.backbone.name,
        "image_size": resolve_inputs(first.data, first.backbone).view.image_size,
        "classes": arguments.classes,
        "images_of_a_process": arguments.images,
        "precision": first.runtime.precision,
        "repeats": arguments.repeats,
        "turns": arguments.turns,
        "device": device_name(device),
        "device_type": device.type,
        "machine": machine(load) | {"threads_of_a_process": int(threads(arguments.processes))},
        "versions": versions(),
    }


def measure(recipes: dict[str, Recipe], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method, strategy and number of processes: what the busiest process sent, and the fastest step."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for turn in range(arguments.turns):
        for method, strategy, processes in groups(recipes, arguments.strategies, arguments.processes):
            print(f"turn {turn + 1}/{arguments.turns}: {method}, {strategy}, {processes} processes", file=sys.stderr)
            found = start(method, strategy, processes, arguments)
            slowest = max(one["step_ms"] for one in found)
            key = (method, strategy, processes)
            if key not in best or slowest < best[key]["step_ms"]:
                busiest = max(found, key=lambda one: one["step_bytes"])
                best[key] = busiest | {
                    "method": method,
                    "strategy": strategy,
                    "processes": processes,
                    "step_ms": slowest,
                }
    return list(best.values())


def of_strategy(found: list[dict[str, Any]], strategy: str, processes: int) -> dict[str, dict[str, float]]:
    """Milliseconds of plain collectives, the fastest of the strategy's starts: it decides whether memory is kept."""
    timed = [one["collectives_ms"] for one in found if (one["strategy"], one["processes"]) == (strategy, processes)]
    return {kind: {size: min(one[kind][size] for one in timed) for size in sizes} for kind, sizes in timed[0].items()}


def groups(
    methods: Sequence[str] | dict[str, Recipe], strategies: Sequence[str], processes: Sequence[int]
) -> Iterator[tuple[str, str, int]]:
    """Method, strategy and processes of everything that is measured."""
    for method in methods:
        for number in sorted({1, *processes}):  # one process alone tells what an engine adds
            yield method, "apart", number
            for strategy in strategies if number > 1 else [s for s in strategies if s.startswith("zero")]:
                if (method, strategy) != ("vqt", "zero3"):  # refused (strategy.py)
                    yield method, strategy, number


def start(method: str, strategy: str, processes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each of several processes of benchmarks/traffic.py says. Raises RunFailed where one fails."""
    share = 1 if strategy == "apart" else processes
    words = ["backbone.weights=random", *METHODS[method], *arguments.overrides]
    words += [f"train.batch_size={arguments.images * share}"]
    command = [sys.executable, str(TRAFFIC), *words]
    command += ["--classes", str(arguments.classes), "--repeats", str(arguments.repeats)]
    with tempfile.TemporaryDirectory() as folder:
        shared = told(strategy, processes, Path(folder)) | {"OMP_NUM_THREADS": threads(arguments.processes)}
        started = []
        for rank in range(processes):
            own = {"CUDA_VISIBLE_DEVICES": f"{rank}"} if strategy == "apart" else {"RANK": f"{rank}"}
            own |= {} if strategy == "apart" else {"LOCAL_RANK": f"{rank}"}
            with (Path(folder) / f"{rank}.txt").open("w") as output:
                started.append(
                    subprocess.Popen(command, env=os.environ | shared | own, stdout=output, stderr=subprocess.STDOUT)
                )
        try:
            codes = wait(started, arguments.timeout)
        finally:
            for process in started:
                process.kill()
                process.wait()
        printed = [(Path(folder) / f"{rank}.txt").read_text() for rank in range(processes)]
    for rank, code in enumerate(codes):
        if code:
            said = printed[rank].strip()[-2000:] or f"exit code {code}"
            raise RunFailed(f"{method}, {strategy}, process {rank} of {processes}: {said}")
    if None in codes:
        raise RunFailed(
            f"{method}, {strategy}, {processes} processes: no result within --timeout {arguments.timeout} s"
        )
    return [json.loads(text.strip().splitlines()[-1]) for text in printed]


def wait(started: list[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Exit codes when all have ended, one has failed or the time is over; None: still running."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in started]
        if any(codes) or None not in codes or time.monotonic() > deadline:
            return codes
        time.sleep(0.1)


def told(strategy: str, processes: int, folder: Path) -> dict[str, str]:
    """The variables by which a launcher tells processes what they are."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    gpu = torch.accelerator.is_available()
    if strategy == "apart":
        return {"PATH": path}
    with socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}", "PATH": path}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    if strategy == "ddp":
        return variables | ({} if gpu else {"ACCELERATE_USE_CPU": "true"})
    file = ROOT / "launch" / "accelerate" / f"{strategy}.json"
    if strategy == "zero0":  # no file of ours: DeepSpeed without sharding is for comparison alone
        file = folder / "zero0.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    variables |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return variables | ({} if gpu else {"DS_ACCELERATOR": "cpu"})


def threads(processes: Sequence[int]) -> str:
    """The same for any number of processes, so that each computes as fast."""
    return str(max(1, (os.cpu_count() or 1) // max(processes)))


def check(found: list[dict[str, Any]], works: dict[str, Work]) -> list[dict[str, Any]]:
    """What was measured, with the model's bytes and times beside it."""
    checked = []
    took = {(one["method"], one["strategy"], one["processes"]): one["step_ms"] for one in found}
    for one in found:
        told = {name: one[name] for name in ("method", "strategy", "processes", "step_ms", "step_bytes", "start_bytes")}
        told |= {name: one[name] for name in ("wire_bytes", "calls", "gradient_bytes")}
        method, strategy, w = one["method"], one["strategy"], one["processes"]
        if strategy != "apart" and w > 1:
            passes, plain = works[method].passes(strategy, w), of_strategy(found, strategy, w)
            exchange = sum(taken(plain[kind], size, calls) for kind, (size, calls) in passes.items())
            engine = took.get((method, strategy, 1), took[method, "apart", 1]) - took[method, "apart", 1]
            told["collectives_ms"] = plain
            told["model_bytes"] = round((w - 1) / w * sent(passes)[0])
            told["bytes_error"] = rounded(told["model_bytes"] / one["step_bytes"] - 1)
            engine = max(0.0, engine)  # noise may take it below
            told |= {"compute_ms": took[method, "apart", w], "engine_ms": rounded(engine)}
            told["exchange_ms"] = rounded(exchange)
            told["model_ms"] = rounded(took[method, "apart", w] + engine + exchange)
            told["ms_error"] = rounded(told["model_ms"] / one["step_ms"] - 1)
        checked.append(told)
    return checked


def taken(plain: dict[str, float], size: float, calls: int) -> float:
    """Milliseconds of so many collectives of one kind on ``size`` bytes in all: a line through few and many bytes."""
    (few, short), (many, long) = sorted((int(bytes_), ms) for bytes_, ms in plain.items())
    rate = max(0.0, long - short) / (many - few)
    return calls * max(0.0, short - rate * few) + rate * size


def work(recipe: Recipe, classes: int) -> Work:
    """Counted on a model without numbers."""
    with torch.device("meta"):
        method, _ = build_method(recipe, resolve_inputs(recipe.data, recipe.backbone), classes)
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
        for method, words in METHODS.items():
            recipe = load_recipe([], [f"backbone.name={backbone}", "backbone.weights=random", *words, *PAPER])
            flops, has = (
                model_flops(recipe, resolve_inputs(recipe.data, recipe.backbone), arguments.classes),
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


PAPER = ("runtime.precision=bf16", "runtime.attention=sdpa")


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


def measured_table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines; bytes are those of a process and step."""
    yield f"{'method':<9} {'strategy':<8} {'W':>2} {'bytes':>12} {'model':>12} {'error':>7} {'ms':>8} {'model':>8}"
    for one in found:
        start = f"{one['method']:<9} {one['strategy']:<8} {one['processes']:>2}"
        if "model_ms" not in one:
            yield f"{start} {0:>12} {'':>12} {'':>7} {one['step_ms']:>8.1f}"
            continue
        yield (
            f"{start} {one['step_bytes']:>12,} {one['model_bytes']:>12,} {one['bytes_error']:>+7.1%} "
            f"{one['step_ms']:>8.1f} {one['model_ms']:>8.1f} {one['ms_error']:+.0%}"
        )


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


def file_name(result: dict[str, Any]) -> str:
    """``scaling-BACKBONE-bIMAGES-PRECISION-DEVICE.json``."""
    words = ["scaling", result["backbone"], f"b{result['images_of_a_process']}", result["precision"]]
    return name_on_device(words, result)


def positive(text: str) -> float:
    """An option's number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return value


def default_processes() -> list[int]:
    """1 and 2 on a CPU, powers of two up to the GPUs of this machine."""
    return (
        [w for w in GPUS if w <= max(torch.accelerator.device_count(), 1)]
        if torch.accelerator.is_available()
        else [1, 2]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/scaling.py", description="Steps of several processes, measured and on paper."
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="for all that is measured, such as a backbone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M", help="to measure")
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="S", help="to measure"
    )
    parser.add_argument(
        "--processes", nargs="+", type=count, default=default_processes(), metavar="N", help="to measure (1 2)"
    )
    parser.add_argument("--images", type=count, default=2, metavar="B", help="of each process, measured (2)")
    parser.add_argument("--turns", type=count, default=2, metavar="N", help="starts of each that is measured (2)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="timed steps of each start (3)")
    parser.add_argument("--timeout", type=count, default=900, metavar="S", help="seconds of a start at most (900)")
    parser.add_argument("--classes", type=count, default=100, metavar="K", help="classes of the head (100)")
    parser.add_argument("--paper", action="store_true", help="measure nothing")
    paper = parser.add_argument_group("on paper (defaults: A100 GPUs, NVLink inside, one 200 Gb/s link a node)")
    paper.add_argument("--batch", type=count, default=64, metavar="B", help="images of each GPU, weak scaling (64)")
    paper.add_argument("--global-batch", type=count, default=1024, metavar="B", help="images, strong scaling (1024)")
    paper.add_argument("--tflops", type=positive, default=120, metavar="F", help="10^12 operations/s achieved (120)")
    paper.add_argument("--overhead-ms", type=positive, default=10, metavar="MS", help="of a step with any batch (10)")
    paper.add_argument("--gpus-per-node", type=count, default=8, metavar="G", help="(8)")
    paper.add_argument("--inside", type=positive, default=200, metavar="GB/s", help="sent by a GPU in its node (200)")
    paper.add_argument("--between", type=positive, default=25, metavar="GB/s", help="sent by a node (25)")
    paper.add_argument("--inside-latency", type=positive, default=5, metavar="us", help="of a message in a node (5)")
    paper.add_argument("--between-latency", type=positive, default=10, metavar="us", help="between nodes (10)")
    parser.add_argument("--out", default=str(RESULTS), metavar="DIR", help="where the JSON file goes")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())

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
from pathlib import Path
from socket import socket
from typing import Any

import torch
from scaling_model import GPUS, METHODS, Work, on_paper, sent, taken, work
from step import RESULTS, count, machine, name_on_device, rounded

from dist_vpt.cli.main import run_with_exit_code
from dist_vpt.errors import RunFailed
from dist_vpt.files import write_atomically
from dist_vpt.recipe.loading import load_recipe
from dist_vpt.recipe.schema import Recipe
from dist_vpt.runs.provenance import device_name, versions
from dist_vpt.runtime.precision import resolve_precision
from dist_vpt.training.inputs import resolve_inputs

ROOT = Path(__file__).parents[1]
TRAFFIC = Path(__file__).parent / "traffic.py"
STRATEGIES = ("ddp", "zero0", "zero1", "zero2", "zero3")


def main(argv: list[str] | None = None) -> int:
    """Measure, model, print tables and JSON, write its file; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)

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
        name: resolve_precision(load_recipe([], ["backbone.weights=random", *METHODS[name], *arguments.overrides]))[0]
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
        "image_size": resolve_inputs(first).transform.image_size,
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
        for number in sorted({1, *processes}):  # one process alone shows what an engine adds
            yield method, "apart", number
            for strategy in strategies if number > 1 else [s for s in strategies if s.startswith("zero")]:
                if (method, strategy) != ("vqt", "zero3"):  # rejected by the engine
                    yield method, strategy, number


def start(method: str, strategy: str, processes: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of each of several processes of benchmarks/traffic.py. Raises RunFailed if one fails."""
    share = 1 if strategy == "apart" else processes
    argv = ["backbone.weights=random", *METHODS[method], *arguments.overrides]
    argv += [f"train.batch_size={arguments.images * share}"]
    command = [sys.executable, str(TRAFFIC), *argv]
    command += ["--classes", str(arguments.classes), "--repeats", str(arguments.repeats)]
    with tempfile.TemporaryDirectory() as folder:
        shared = launcher_variables(strategy, processes, Path(folder)) | {
            "OMP_NUM_THREADS": threads(arguments.processes)
        }
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
            message = printed[rank].strip()[-2000:] or f"exit code {code}"
            raise RunFailed(f"{method}, {strategy}, process {rank} of {processes}: {message}")
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


def launcher_variables(strategy: str, processes: int, folder: Path) -> dict[str, str]:
    """The environment variables that a launcher sets."""
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
    if strategy == "zero0":  # not shipped: DeepSpeed without sharding is for comparison only
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
        row = {name: one[name] for name in ("method", "strategy", "processes", "step_ms", "step_bytes", "start_bytes")}
        row |= {name: one[name] for name in ("wire_bytes", "calls", "gradient_bytes")}
        method, strategy, w = one["method"], one["strategy"], one["processes"]
        if strategy != "apart" and w > 1:
            passes, plain = works[method].passes(strategy, w), of_strategy(found, strategy, w)
            exchange = sum(taken(plain[kind], size, calls) for kind, (size, calls) in passes.items())
            engine = took.get((method, strategy, 1), took[method, "apart", 1]) - took[method, "apart", 1]
            row["collectives_ms"] = plain
            row["model_bytes"] = round((w - 1) / w * sent(passes)[0])
            row["bytes_error"] = rounded(row["model_bytes"] / one["step_bytes"] - 1)
            engine = max(0.0, engine)  # noise may take it below
            row |= {"compute_ms": took[method, "apart", w], "engine_ms": rounded(engine)}
            row["exchange_ms"] = rounded(exchange)
            row["model_ms"] = rounded(took[method, "apart", w] + engine + exchange)
            row["ms_error"] = rounded(row["model_ms"] / one["step_ms"] - 1)
        checked.append(row)
    return checked


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


def file_name(result: dict[str, Any]) -> str:
    """``scaling-BACKBONE-bIMAGES-PRECISION-DEVICE.json``."""
    argv = ["scaling", result["backbone"], f"b{result['images_of_a_process']}", result["precision"]]
    return name_on_device(argv, result)


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

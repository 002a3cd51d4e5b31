"""Prove that a change of the code changes no number: run the same trainings before and after, and compare.

    python tools/equality.py before.json                      # in the checkout that is to be measured
    python tools/equality.py after.json                       # in the changed one
    python tools/equality.py --compare before.json after.json
    python tools/equality.py out.json --only vqt lora         # some of the runs; compressions need vqt

Short runs on the digits dataset and the demo backbone, of every kind of method, on one process and on two, a sweep and
compressions, all through the command line and the ``dist_vpt`` of the current folder. Of each the file keeps, with all
digits, the training losses (of every step and epoch), every score of every split and trial, and a hash over the tensors
of the adapters. The runs compute on the CPU with one thread a process, so on one machine equal code gives equal files.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 900
COMMON = (
    *("seed=0", "train.epochs=3", "train.batch_size=64", "train.eval_every=1", "optim.warmup_epochs=1"),
    *("run.log_every=1", "runtime.precision=fp32"),
)
DIST_VPT = (sys.executable, "-m", "dist_vpt")
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/ddp.yaml"),
    *("--cpu", "--num_processes", "2", "--main_process_port", "0", "-m", "dist_vpt"),
)
SWEEP = ("sweep.grid={optim: {lr: [0.1, 0.5], weight_decay: [0.01, 0.0]}}", "sweep.seeds=[0, 1]")
OPTIONS = (
    *("data.augment=fgvc", "backbone.drop_path=0.1", "method.dropout=0.1", "optim.clip_norm=1.0"),
    *("train.label_smoothing=0.1", "train.class_weights=inv", "data.train_on=trainval"),
)


def _train(recipe: str, *overrides: str) -> tuple[str, ...]:
    return (*DIST_VPT, "train", f"configs/digits/{recipe}.yaml", *COMMON, *overrides, "run.dir={run}")


def _method(name: str) -> tuple[str, ...]:
    return (*DIST_VPT, "train", "configs/base.yaml", f"configs/method/{name}.yaml", *COMMON, "run.dir={run}")


def _local(strategy: str, recipe: str) -> tuple[str, ...]:
    return ("launch/local.sh", strategy, "2", f"configs/digits/{recipe}.yaml", *COMMON, "run.dir={run}")


def _sweep(command: Sequence[str], recipe: str, *overrides: str) -> tuple[str, ...]:
    return (*command, "sweep", f"configs/digits/{recipe}.yaml", *COMMON, *SWEEP, *overrides, "run.dir={run}")


def _compress(mode: str) -> tuple[str, ...]:
    return (*DIST_VPT, "compress", "{runs}/vqt", "--keep", "0.7", "0.3", "--mode", mode, "--out", "{run}")


RUNS: dict[str, tuple[str, ...]] = {  # {run}: the run's own folder; {runs}: that of all
    "vpt_shallow": _train("vpt_shallow"),
    "vpt_deep": _train("vpt_deep"),
    "vpt_deep_bf16": _train("vpt_deep", "runtime.precision=bf16"),
    "vpt_deep_options": _train("vpt_deep", *OPTIONS),
    "vqt": _train("vqt"),
    "vqt_bf16": _train("vqt", "runtime.precision=bf16", "method.dropout=0.1"),
    "linear": _train("linear"),
    "full": _train("full"),
    **{name: _method(name) for name in ("side", "lora", "adapter", "ssf", "bias", "mlp", "adaptformer", "partial")},
    "ddp_vpt_deep": _local("ddp", "vpt_deep"),
    "ddp_vqt": _local("ddp", "vqt"),
    "zero3_vpt_deep": _local("zero3", "vpt_deep"),
    "sweep_vqt": _sweep(DIST_VPT, "vqt"),
    "sweep_vqt_two_processes": _sweep(LAUNCH, "vqt"),
    "sweep_vpt_shallow": _sweep(DIST_VPT, "vpt_shallow", "sweep.grid={optim: {lr: [0.5, 2.0]}}", "train.epochs=2"),
    "compress_compress": _compress("compress"),
    "compress_featselect": _compress("featselect"),
    "compress_finetune": _compress("finetune"),
}


def measure(names: Sequence[str], out: Path) -> int:
    """Do the runs and write what they gave; returns the exit code."""
    environment = _environment()
    _check_checkout(environment)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="equality-") as folder:
        for name in names:
            run = Path(folder) / name
            command = [word.replace("{runs}", folder).replace("{run}", str(run)) for word in RUNS[name]]
            start = time.monotonic()
            failure = _call(command, environment, Path(folder) / f"{name}.log")
            results[name] = {"failed": failure} if failure else collect(run)
            outcome = f"FAILED: {failure}" if failure else f"{len(results[name]['losses'])} losses"
            print(f"{name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any("failed" in result for result in results.values()))


def _environment() -> dict[str, str]:
    """One thread a process, no GPU, no network, this Python, and the package of the current folder."""
    path, packages = os.environ.get("PATH", ""), os.environ.get("PYTHONPATH")
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), path]),
        "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *([packages] if packages else [])]),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def _check_checkout(environment: dict[str, str]) -> None:
    ask = [sys.executable, "-c", "import dist_vpt; print(dist_vpt.__file__)"]
    found = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).resolve().is_relative_to(Path.cwd().resolve()):
        sys.exit(f"dist_vpt is taken from {found}; start this in the folder of a checkout")


def _call(command: Sequence[str], environment: dict[str, str], log: Path) -> str | None:
    """Run a command to its end; the end of its output where it fails. Ends all of its processes where it hangs."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none after {TIMEOUT_SECONDS} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return None if code == 0 else f"exit code {code}:\n{log.read_text(errors='replace')[-2000:]}"


def collect(run: Path) -> dict[str, Any]:
    """Losses, scores and hashes of everything that lies in a run, a sweep or a compression."""
    scores: dict[str, Any] = {}
    steps: list[float] = []
    epochs: list[float] = []
    for file in sorted(run.rglob("metrics.jsonl")):
        for line in map(json.loads, file.read_text().splitlines()):
            place = f"{file.relative_to(run)}.{line['split']}.{line['epoch']}"
            scores |= {f"{place}.{key}": line[key] for key in line if key not in ("split", "epoch")}
            epochs += [line["loss"]] if line["split"] == "train" else []
    for file in sorted(run.rglob("events.out.tfevents.*")):
        steps += _step_losses(file)
    for file in sorted([*run.rglob("result.json"), *run.rglob("sweep.json")]):
        content = json.loads(file.read_text())
        kept = {key: content[key] for key in ("last", "best", "chosen", "trials", "seeds", "test") if key in content}
        scores |= {f"{file.relative_to(run)}.{key}": value for key, value in _flat(kept) if key[-7:] != "seconds"}
    results = [scores[key] for key in scores if key.endswith("last.train.loss")]  # all that trials in one pass leave
    tensors = {
        str(file.relative_to(run)): _hash(file)
        for name in ("adapters", "best")
        for file in sorted(run.rglob(f"{name}.safetensors"))
        if "state" not in file.relative_to(run).parts
    }
    return {"losses": [*epochs, *steps, *results], "scores": scores, "tensors": tensors}


def _step_losses(events: Path) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0})
    accumulator.Reload()
    found = "train/loss" in accumulator.Tags()["scalars"]
    return [event.value for event in accumulator.Scalars("train/loss")] if found else []


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, with their keys joined by dots."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{at}.{key}" if at else str(key))
    else:
        yield at, value


def _hash(file: Path) -> str:
    """A hash over names, types, shapes and bytes of all tensors of a safetensors file, without its metadata."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    digest = hashlib.sha256()
    for name, tensor in sorted(json.loads(content[8:start]).items()):
        if name != "__metadata__":
            begin, end = tensor["data_offsets"]
            digest.update(f"{name} {tensor['dtype']} {tensor['shape']} ".encode())
            digest.update(content[start + begin : start + end])
    return digest.hexdigest()


def compare(before: Path, after: Path) -> int:
    """Print a line for each run; returns 1 where one differs, failed or is missing, else 0."""
    a, b = json.loads(before.read_text()), json.loads(after.read_text())
    names = list(dict.fromkeys([*a, *b]))
    differences = {name: _first_difference(a.get(name), b.get(name)) for name in names}
    width = max(map(len, ["run", *names]))
    print(f"{'run':{width}}  losses  scores  files")
    for name in names:
        found = a.get(name) or b[name]
        counts = "".join(
            f"{len(found.get(key, ())):{n}}  " for key, n in (("losses", 6), ("scores", 6), ("tensors", 5))
        )
        print(f"{name:{width}}  {counts}{differences[name] or 'equal'}")
    different = [name for name in names if differences[name]]
    print(f"{len(names) - len(different)} of {len(names)} runs are equal")
    return int(bool(different) or not names)


def _first_difference(a: dict[str, Any] | None, b: dict[str, Any] | None) -> str | None:
    if a is None or b is None:
        return f"is missing in the {'first' if a is None else 'second'} file"
    for which, run in (("first", a), ("second", b)):
        if "failed" in run:
            return f"failed in the {which} file"
        if not (run["scores"] and run["tensors"]):
            return f"has no scores or no tensors in the {which} file"
    for part in ("losses", "scores", "tensors"):
        old, new = (dict(_flat(run[part], part)) for run in (a, b))
        for key in dict.fromkeys([*old, *new]):
            one, other = old.get(key, "nothing"), new.get(key, "nothing")
            if json.dumps(one) != json.dumps(other):  # so that nan equals nan
                return f"{key}: {one} != {other}"
    return None


def main() -> int:
    """Measure or compare; returns the exit code."""
    parser = argparse.ArgumentParser(description="Prove that a change of the code changes no number.")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json", help="do all runs and write what they gave")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=f"some of them: {', '.join(RUNS)}")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="compare two such files")
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either OUT.json or --compare with two files")
    return compare(*options.compare) if options.compare else measure(options.only or list(RUNS), options.out)


if __name__ == "__main__":
    sys.exit(main())

"""``dist-vpt suite``: tasks x methods under one protocol, each experiment a sweep, shared out among workers.

Any number of workers, on any number of machines with a common folder, can be started, killed and started again
(``suite_worker.py``).

    OUT/manifest.json            the plan: experiments with their recipes' hashes and numbers of trials and seeds
    OUT/TASK/METHOD/             a sweep's folder
    OUT/results.jsonl            a line for each experiment that has ended, also for one that failed
    OUT/claims/                  locks of work items, and when an experiment failed
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_vpt.distributed.launch_env import PROCESSES_PER_GPU, LaunchEnv, detach_from_launcher, visible_devices
from dist_vpt.distributed.signals import STOP
from dist_vpt.errors import Interrupted, RunFailed, UserError
from dist_vpt.experiments.suite_plan import Experiment, check_roots, record_plan, with_storage
from dist_vpt.runs.folder import RESUME_HINT
from dist_vpt.runs.results import FILE, finished_runs, read

WORKER_VARIABLE = "DIST_VPT_SUITE_WORKER"  # set for the processes that a suite starts as its workers


def suite(
    experiments: Sequence[Experiment],
    out: str,
    *,
    workers: int | None = None,
    index: int | None = None,
    arguments: Sequence[str],
) -> None:
    """Do what is left of a suite, in this process or in several that it starts, then print the results.

    ``index``: one experiment, by its number in the plan (an element of a job array). ``arguments``: of the command, for
    the processes that are started. Raises RunFailed where an experiment has failed, after all others are done.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    folder, launch = Path(out), LaunchEnv.current()
    launched = launch.world_size > 1
    check_roots(experiments)
    experiments = [with_storage(experiment) for experiment in experiments]
    record_plan(folder, experiments)
    mine = list(experiments)
    if index is not None:
        if not 0 <= index < len(experiments):
            last = len(experiments) - 1
            raise UserError(f"--index {index}: the suite has the elements 0 to {last} (dist-vpt suite --dry-run)")
        mine = [experiments[index]]
    reasons: dict[str, str] = {}
    if {experiment.key for experiment in mine} <= finished_runs(folder / FILE):
        count = 0  # torch is not even loaded
    else:
        count = 1 if launched or WORKER_VARIABLE in os.environ else workers or len(visible_devices()) or 1
    if launched:  # each process of a launch is a worker
        detach_from_launcher(launch)
    if count > 1:
        _start_workers(count, [*arguments, *([] if index is None else ["--index", str(index)])])
    elif count:
        from dist_vpt.experiments.suite_worker import SuiteWorker

        worker = SuiteWorker(folder, mine)
        worker.work()
        reasons = worker.failed
    if WORKER_VARIABLE in os.environ:
        return  # the process that started it prints the results
    failed = _print_results(folder, mine, reasons)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(mine)} have no result:\n" + "\n".join(failed))


def _start_workers(count: int, arguments: Sequence[str]) -> None:
    """Run so many processes of this machine as workers, each on a device of its own, and wait for them."""
    devices, cores = visible_devices(), os.cpu_count() or 1
    children = []
    for number in range(count):
        environment = {
            **os.environ,
            WORKER_VARIABLE: str(number),
            "LOCAL_WORLD_SIZE": str(count),  # each may use its share of the memory
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count))),
        }
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
            environment[PROCESSES_PER_GPU] = str(-(-count // len(devices)))
        command = [sys.executable, "-m", "dist_vpt", "suite", *arguments, "--workers", "1"]
        children.append(subprocess.Popen(command, env=environment))

    def forward(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    previous = {s: signal.signal(s, forward) for s in STOP}
    try:
        codes = [child.wait() for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
        for number, handler in previous.items():
            signal.signal(number, handler)
    if {Interrupted.exit_code, Interrupted.BY_KEYBOARD, *(-number for number in STOP)} & set(codes):
        stopped = Interrupted(f"the workers were stopped; {RESUME_HINT}")
        if {Interrupted.BY_KEYBOARD, -signal.SIGINT} & set(codes):
            stopped.exit_code = Interrupted.BY_KEYBOARD
        raise stopped
    for number, code in enumerate(codes):
        if code:
            print(f"worker {number} ended with exit code {code}; {RESUME_HINT}", file=sys.stderr)


def _print_results(folder: Path, experiments: Sequence[Experiment], reasons: Mapping[str, str]) -> list[str]:
    """Print the table of a suite; returns a line for each experiment without a result.

    ``reasons``: of failures by key, for those that could not be written into the folder.
    """
    file = folder / FILE
    found = {result.run: result for result in (read(file)[0] if file.is_file() else [])}
    table = Table(title=f"{folder}: test score (%: top-1, or mAP), mean and standard deviation")
    for column in ("task", "method", "test", "val", "trained", "seconds", "chosen"):
        text = column in ("task", "method", "chosen")
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "chosen")
    failed = []
    for experiment in experiments:
        result = found.get(experiment.key)
        if result is None or result.failed:
            reason = result.failed if result else reasons.get(experiment.key, "was not begun")
            failed.append(f"  {experiment.name}: {reason}")
            table.add_row(experiment.task, experiment.trained, "failed")
            continue
        score, parameters = result.main, result.parameters
        table.add_row(
            experiment.task,
            experiment.trained,
            f"{score.mean:.2f} ± {score.std:.2f}",
            f"{result.val['last']:.2f}",
            f"{parameters.trained:,}" if parameters else "",
            f"{result.seconds:.0f}",
            "\n".join(f"{key.removeprefix('optim.')} {value}" for key, value in result.chosen.items()),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{file}; dist-vpt report {folder} compares them with published numbers", soft_wrap=True)
    return failed

"""Runs in processes forked from the tests' own: what they import is there already, which a launcher has to do anew.

test_two_processes.py tests launchers; here two processes get the variables that a launcher sets. Tests that fork use
the fixture on_the_cpu: a forked process cannot use a GPU that its parent has used.
"""

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from dist_vpt.cli.main import main

ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")


class Forks:
    """``work(rank)`` in ``count`` processes, under way from the start on."""

    def __init__(self, count: int, work: Callable[[int], Any], log: Path | None = None):
        self.log = log  # file of what all of them print; None: where the tests print
        self.processes = [FORK.Process(target=self._work, args=(work, rank)) for rank in range(count)]
        for process in self.processes:
            process.start()

    def _work(self, work: Callable[[int], Any], rank: int) -> None:
        sys.settrace(None)  # coverage's, which would be paid for and then lost
        threading.settrace(None)  # type: ignore[arg-type]
        # Renews torch's pool of threads while there is one thread: autograd's, started together, would race to do it.
        torch.set_num_threads(torch.get_num_threads())
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()
        forkserver._forkserver.__init__()  # type: ignore[misc]  # one that tests have started is no child of this process
        if self.log is not None:
            file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        code = work(rank)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def send(self, signal: int, rank: int = 0) -> None:
        """A signal to one of them."""
        number = self.processes[rank].pid
        assert number is not None
        os.kill(number, signal)

    def finish(self, seconds: float = 400) -> list[int | None]:
        """Their exit codes. Ends them all where one hangs."""
        for process in self.processes:
            process.join(seconds)
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
            process.join()
        assert not hung, f"hung:\n{self.output[-3000:]}"
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log is not None and self.log.exists() else ""


def command(
    argv: list[str], log: Path, strategy: str = "single", before: Callable[[int], None] = lambda rank: None
) -> Forks:
    """`dist-vpt` with ``argv`` on one process (``single``), or on two: ``ddp``, or a DeepSpeed configuration's file.

    ``before(rank)`` is called first.
    """

    def work(rank: int) -> int:
        before(rank)
        return main(argv)

    return launched(work, log, strategy)


def launched(work: Callable[[int], Any], log: Path, strategy: str) -> Forks:
    """``work(rank)`` on the processes of a strategy (as in ``command``), with the variables that a launcher sets."""
    count = 1 if strategy == "single" else 2
    variables = {} if strategy == "single" else _launcher_variables(strategy)

    def launched_work(rank: int) -> Any:
        os.environ.update(variables)
        if count > 1:
            os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}")
        return work(rank)

    return Forks(count, launched_work, log)


def _launcher_variables(strategy: str) -> dict[str, str]:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    if strategy == "ddp":
        return variables | {"ACCELERATE_USE_CPU": "true"}
    # Once, before the processes are forked: the latter, with all of a compiler, is what every DeepSpeed engine imports.
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    return variables | {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": strategy,
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed looks for ninja
    }

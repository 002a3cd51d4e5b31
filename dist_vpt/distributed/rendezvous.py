"""Where the processes of a run meet: what goes wrong there is told with the address, the port and what to do."""

import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.errors import UserError

NEWS_SECONDS = 30.0  # a process that still waits then says where, and for whom


@contextmanager
def rendezvous(minutes: float) -> Iterator[None]:
    """Processes that a launcher has started meet within. Raises UserError where they do not."""
    launch = LaunchEnv.current()
    world, address, port = launch.world_size, launch.master_addr, launch.master_port
    if world == 1 or not launch.launched:
        yield
        return
    if not address or not port:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(f"{missing} is not set, and {world} processes must meet; start them with `accelerate launch`")
    where, who = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)", f"process {launch.rank} of {world}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"{where}: {who} cannot resolve {address} on {socket.gethostname()} ({error.strerror}); "
            "give the head node's address, or a name that all nodes know"
        ) from error
    lost = (
        f"{where}: {who} met no process 0 there within {minutes:g} minutes (run.timeout_minutes); see whether process "
        "0 has started and what it says, whether another program has that port, and whether a firewall is between"
    )
    news = f"{who} waits for the others at {where}; it gives up after {minutes:g} minutes (run.timeout_minutes)"
    threads = [
        threading.Timer(NEWS_SECONDS, print, [news], {"file": sys.stderr, "flush": True}),
        # A program that takes the connection and never answers keeps torch waiting for ever.
        threading.Timer(60 * minutes + 2 * MARGIN_SECONDS, _give_up, [lost]),
    ]
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        raise UserError(_said(str(error), where, who, lost, minutes)) from error
    finally:
        for thread in threads:
            thread.cancel()


def _said(told: str, where: str, who: str, lost: str, minutes: float) -> str:
    if "EADDRINUSE" in told:
        return (
            f"{where}: the port is taken by another program on {socket.gethostname()}; choose another one for all "
            "processes (accelerate launch --main_process_port PORT; 0 takes a free one, on a single machine)"
        )
    came = re.search(r"(\d+)/(\d+) clients joined", told)
    if came:
        return (
            f"{where}: {came[1]} of {came[2]} processes came within {minutes:g} minutes (run.timeout_minutes); see "
            "what the others say, and whether they are given the same address, port and number of processes"
        )
    if "timed out" in told or "Ping failed" in told or "reset" in told:
        return lost
    return (
        f"{where}: {who} cannot connect to the others ({told.splitlines()[0][:300]}); where a node has several "
        "networks, name the one that they share in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def _give_up(message: str) -> Never:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


MARGIN_SECONDS = 60.0  # the process group gives up so much later than the thread, which knows more
SIGNS = ("gloo", "Gloo", "Connection closed by peer", "NCCL", "ProcessGroup")  # in what a process group raises


def is_peer_failure(error: BaseException) -> bool:
    """Whether a process meets this because of another: what the process group raises where one is gone or late."""
    from torch.distributed import DistError

    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return told or isinstance(error, DistError)

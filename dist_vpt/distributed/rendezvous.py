"""How the processes of a run find each other; errors there give the address, the port and the fix."""

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

NOTICE_SECONDS = 30.0  # after which a process that still waits reports where, and for whom
MARGIN_SECONDS = 60.0  # the process group gives up so much later than the watchdog, which knows more
SIGNS = ("gloo", "Gloo", "Connection closed by peer", "NCCL", "ProcessGroup")  # in what a process group raises


@contextmanager
def rendezvous(launch: LaunchEnv, minutes: float) -> Iterator[None]:
    """Within, processes of a launcher initialize their process group. Raises UserError where they cannot."""
    world, address, port = launch.world_size, launch.master_addr, launch.master_port
    if world == 1 or not launch.launched:
        yield
        return
    if not address or not port:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(f"{missing} is not set, but {world} processes need it; start them with `accelerate launch`")
    where, who = f"{address}:{port} (MASTER_ADDR, MASTER_PORT)", f"process {launch.rank} of {world}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"{where}: {who} cannot resolve {address} on {socket.gethostname()} ({error.strerror}); "
            "give the head node's address, or a name that all nodes know"
        ) from error
    unreachable = (
        f"{where}: {who} could not reach process 0 there within {minutes:g} minutes (run.timeout_minutes); check "
        "whether process 0 has started and what it reports, whether another program uses that port, and whether a "
        "firewall is in between"
    )
    notice = f"{who} waits for the others at {where}; it gives up after {minutes:g} minutes (run.timeout_minutes)"
    timers = [
        threading.Timer(NOTICE_SECONDS, print, [notice], {"file": sys.stderr, "flush": True}),
        # A program that accepts the connection and never answers keeps torch waiting for ever.
        threading.Timer(60 * minutes + 2 * MARGIN_SECONDS, _give_up, [unreachable]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        raise UserError(_message(str(error), where, who, unreachable, minutes)) from error
    finally:
        for timer in timers:
            timer.cancel()


def _message(error: str, where: str, who: str, unreachable: str, minutes: float) -> str:
    if "EADDRINUSE" in error:
        return (
            f"{where}: the port is used by another program on {socket.gethostname()}; choose another one for all "
            "processes (accelerate launch --main_process_port PORT; 0 takes a free one, on a single machine)"
        )
    joined = re.search(r"(\d+)/(\d+) clients joined", error)
    if joined:
        return (
            f"{where}: {joined[1]} of {joined[2]} processes joined within {minutes:g} minutes (run.timeout_minutes); "
            "check what the others report, and that they get the same address, port and number of processes"
        )
    if "timed out" in error or "Ping failed" in error or "reset" in error:
        return unreachable
    return (
        f"{where}: {who} cannot connect to the others ({error.splitlines()[0][:300]}); where a node has several "
        "networks, name the one that they share in GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
    )


def _give_up(message: str) -> Never:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(UserError.exit_code)


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error is due to another process: what a process group raises where one is gone or late."""
    from torch.distributed import DistError

    by_group = isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    return by_group or isinstance(error, DistError)

"""``dist-vpt``: collects the sub-commands, and turns errors into exit codes. ``--help`` imports no torch."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dist_vpt import __version__
from dist_vpt.cli import (
    backbones,
    compare,
    compress,
    data,
    diagnosis,
    inference,
    launch,
    plan,
    probe,
    rank_backbones,
    recipe,
    report,
    suite,
    sweep,
    train,
)
from dist_vpt.distributed.caches import move_unwritable_caches
from dist_vpt.distributed.launch_env import LaunchEnv
from dist_vpt.distributed.limits import file_size_advice
from dist_vpt.distributed.rank_log import quiet_libraries
from dist_vpt.errors import UserError
from dist_vpt.files import printable

# Of paths that a command names and the system refuses, wherever that is noticed.
WRONG_NAMES = (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EROFS)
COMMANDS = (
    *(train, sweep, probe, rank_backbones, plan, suite, launch, inference, compress),
    *(report, compare, diagnosis, data, backbones, recipe),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit code."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started this process
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    os.environ["MPLBACKEND"] = "agg"  # figures are files; the backend of a notebook may not be installed here
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if any(argument.startswith("-") for argument in more) or (more and "rest" not in arguments):
        keys = getattr(arguments, "rest", "") in ("recipe", "overrides")
        hint = " (keys of the recipe are given as train.epochs=3)" if keys else ""
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint}")
    if more:  # argparse does not continue a list of arguments after an option
        getattr(arguments, arguments.rest).extend(more)
    note = move_unwritable_caches()  # before a library reads its variable
    if note and not _rank():
        print(note, file=sys.stderr, flush=True)
    quiet_libraries()
    return run_with_exit_code(lambda: arguments.call(arguments), debug=arguments.debug)


def run_with_exit_code(call: Callable[[], Any], *, debug: bool) -> int:
    """Run ``call``; a UserError becomes one message and its exit code, all other errors keep their traceback."""
    try:
        call()
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        rank = _rank()
        if error.shared and rank:
            return error.exit_code
        print(f"{f'[process {rank}] ' if rank else ''}error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        return 141
    except (OSError, RuntimeError) as error:
        message = file_size_advice(error) and f"{error}: {file_size_advice(error)}"
        if isinstance(error, OSError) and error.filename is not None and error.errno in WRONG_NAMES:
            where = printable(str(error.filename))
            message = f"{where}: {error.strerror}; name another path (--debug shows the traceback)"
        if debug or not message:
            raise
        print(f"error: {message}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _rank() -> int:
    """For messages: that of a process whose environment is broken is reported as well."""
    try:
        return LaunchEnv.current().rank
    except UserError:
        return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="dist-vpt",
        description="Tune frozen vision transformers: pay only for what you tune.",
        epilog="example:\n  dist-vpt train quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dist-vpt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())

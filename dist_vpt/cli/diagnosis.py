"""The arguments of ``dist-vpt status`` (status.py) and ``dist-vpt doctor`` (doctor.py)."""

import argparse
from typing import Any

from dist_vpt.cli.arguments import add_command
from dist_vpt.errors import UserError

SECONDS = "5"  # between two looks


def add_parser(commands: Any) -> None:
    help = "show the progress of runs, sweeps and suites"
    parser = add_command(commands, "status", status, help, rest="folders", example="dist-vpt status runs --watch")
    parser.add_argument("folders", nargs="*", metavar="DIR", help="their folders, or folders that contain them (runs)")
    parser.add_argument("--json", action="store_true", help="print a list of objects, for programs")
    parser.add_argument(
        "--watch", nargs="?", const=SECONDS, metavar="SECONDS", help="repeat every so many seconds (5), until Ctrl-C"
    )
    parser = add_command(commands, "doctor", doctor, "check this machine, and say how to fix what is wrong")
    parser.add_argument("--run-dir", default="runs", metavar="DIR", help="where runs will be written (runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def status(arguments: argparse.Namespace) -> None:
    from dist_vpt.cli.status import status

    folders, seconds = arguments.folders, None
    try:
        seconds = None if arguments.watch is None else float(arguments.watch)
    except ValueError:
        if folders:
            raise UserError(
                f"--watch {arguments.watch}: is not a number of seconds; name folders before --watch"
            ) from None
        folders, seconds = [arguments.watch], float(SECONDS)  # argparse takes what follows the option for its number
    status(folders or ["runs"], as_json=arguments.json, watch=seconds)


def doctor(arguments: argparse.Namespace) -> None:
    from dist_vpt.cli.doctor import doctor

    doctor(arguments.run_dir, as_json=arguments.json)

"""Errors that the user can fix. Everything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input or a refused request: the message gives the location, the value, the rule and the fix.

    The command line prints the message alone (a traceback with ``--debug``) and exits with ``exit_code``.
    """

    exit_code = 2
    shared = False  # whether every process raises it, so that the first one alone reports it


class RecipeError(UserError):
    """One or more mistakes in a recipe, all of them in the message."""


class DataError(UserError):
    """A file, label, split or image that breaks the rules of its storage format."""


class SourceUnavailable(DataError):
    """Data that cannot be fetched, or a file under an address that has changed: the fault of no single image.

    So ``data.on_decode_error: skip`` does not pass over it.
    """


class WeightsError(UserError):
    """Weights that are missing, unreadable or of another architecture."""


class RunFolderError(UserError):
    """A run folder that is in use, belongs to another recipe, or is damaged."""


class RunFailed(UserError):
    """Training cannot continue (a loss that is not finite, a disk that stays full); the run is marked as failed."""

    exit_code = 3


class ProcessFailed(UserError):
    """Another process of the run is gone, has failed or hangs; the run is marked as failed with its reason.

    Where that process raised a UserError, ``exit_code`` is that error's.
    """

    exit_code = 4


class Diverged(RunFailed):
    """A loss or a gradient is not finite: the setting's own fault, after which a sweep continues."""


class Pruned(RunFailed):
    """A search has ended this trial early: the settings before it were better after as many epochs."""


class OutOfMemory(RunFailed):
    """A device's memory is not enough; the message ends with what would fit."""


class Interrupted(UserError):
    """The run was asked to stop and can be resumed from its newest state.

    ``exit_code`` is EX_TEMPFAIL of sysexits.h after a signal of a cluster, and the shell's 128 + SIGINT after Ctrl-C:
    what restarts a stopped job by its code must not restart what somebody has stopped by hand.
    """

    BY_KEYBOARD = 130
    exit_code = 75


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that ends a message about an unknown name: the nearest valid one, or all of them."""
    valid = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"


@contextmanager
def adding_to_data_errors(hint: str) -> Iterator[None]:
    """End the message of a DataError raised within by ``hint``: what has been kept."""
    try:
        yield
    except DataError as error:
        error.args = (f"{error}; {hint}",)
        raise

"""Limits of the system on a process (``ulimit``) that a training can meet: open files, and the size of a file."""

import resource

from dist_vpt.errors import UserError

OPEN_FILES = 64  # of a training without workers, connections between processes included
OPEN_FILES_PER_WORKER = 16  # pipes and shared memory, of the workers of train and of val


def check_open_files(workers: int) -> None:
    """Raise the soft limit on open files to what a training with data.workers needs, or a UserError where it cannot be.

    Beyond the limit, torch's workers hang or end with an error of their own.
    """
    needed = OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if workers == 0 or soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise UserError(
        f"the system allows this process {hard} open files, and data.workers = {workers} needs up to {needed}; raise "
        "the limit before the command (ulimit -n 4096), or set data.workers=0"
    )


def file_size_advice(error: BaseException) -> str:
    """What to do where a file has met the limit on its size, shared memory included; "" for other errors."""
    if "File too large" not in str(error):  # torch raises a RuntimeError with the system's text
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return ""
    return (
        f"the system allows files of {soft:,} bytes at most; raise the limit before the command (ulimit -f unlimited)"
    )

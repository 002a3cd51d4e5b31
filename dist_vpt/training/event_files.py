"""TensorBoard's event files: a thread of its writer that fails, as on a full disk, prints no traceback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_traceback_of_event_writer() -> Iterator[None]:
    """While event files are written: the writer's next call raises its thread's error, which Python would print too."""
    former = threading.excepthook

    def hook(args: threading.ExceptHookArgs, /) -> None:
        if args.thread is None or not _writes_events(args.thread):
            former(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if _writes_events(thread) and getattr(thread, "exception", None) is not None:
                thread.join()  # has its error, and is about to call the hook
        if threading.excepthook is hook:
            threading.excepthook = former


def _writes_events(thread: threading.Thread) -> bool:
    return type(thread).__module__ == "tensorboard.summary.writer.event_file_writer"

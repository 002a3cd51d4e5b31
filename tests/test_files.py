"""Locks: their file names the holder, others leave it alone, and they end with the process that holds them."""

import json
import os
import signal
import time
from pathlib import Path

from dist_vpt.files import is_locked, lock_nowait, locked, printable, to_json


def test_others_leave_the_holder_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked(file, "", holder="process 1") as acquired:
        assert acquired
        with locked(file, "", holder="process 2") as other:
            assert not other
        assert file.read_text() == "process 1"
        assert is_locked(file)
    assert not is_locked(file)
    with locked(file, "", holder="me") as acquired:
        assert acquired
        assert file.read_text() == "me"


def test_waiting_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as holder:
        lock_nowait(holder.fileno())
        answers = iter([False, False, True])
        with locked(tmp_path / "lock", "", timeout=-1, cancel=lambda: next(answers)) as acquired:
            assert not acquired
    assert next(answers, None) is None


def test_a_look_does_not_keep_a_free_lock_from_being_acquired(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as file:
        assert not is_locked(tmp_path / "lock")
        lock_nowait(file.fileno())
        assert is_locked(tmp_path / "lock")


def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with locked(tmp_path / "lock", ""):
            if os.fork() == 0:  # as a loader worker
                os.write(write, str(os.getpid()).encode())
                time.sleep(60)
                os._exit(0)
            signal.pause()
    child = int(os.read(read, 20))
    try:
        assert is_locked(tmp_path / "lock")
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert not is_locked(tmp_path / "lock")
    finally:
        os.kill(child, signal.SIGKILL)


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    content = {"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": -float("inf"), "e": None, "f": (1, "x")}}
    assert json.loads(to_json(content)) == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": None, "f": [1, "x"]}}


def test_names_are_escaped_only_where_they_must_be() -> None:
    assert printable("Bild 3.45.12\u202fPM \u3000\u200d日本.png") == "Bild 3.45.12\u202fPM \u3000\u200d日本.png"
    assert printable(os.fsdecode(b"caf\xe9\n\x1b")) == "caf\\xe9\\n\\x1b"

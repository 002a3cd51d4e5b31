"""The folder of fetched pieces: its budget, who fetches, and what an interruption leaves."""

import errno
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from dist_vpt.data.spool import Spool
from dist_vpt.errors import SourceUnavailable


def writing(content: bytes, calls: list[str] | None = None, name: str = "") -> Callable[[BinaryIO], None]:
    def write(sink: BinaryIO) -> None:
        if calls is not None:
            calls.append(name)
        sink.write(content)

    return write


def taken(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_piece_is_fetched_once_until_others_need_its_room(tmp_path: Path) -> None:
    spool, calls = Spool(tmp_path, 1000), list[str]()

    def read(name: str) -> None:
        with spool.open(name, 400, writing(name.encode() * 400, calls, name)) as opened:
            assert opened.read() == name.encode() * 400
        time.sleep(0.01)
        assert taken(tmp_path) <= 1000

    for name in "aabab":
        read(name)
    assert calls == ["a", "b"]
    read("c")  # in place of a, which was used before b
    read("b")
    read("a")
    assert calls == ["a", "b", "c", "a"]


def test_a_piece_that_is_open_stays_readable(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 500)
    with spool.open("a", 400, writing(b"a" * 400)) as opened:
        spool.open("b", 400, writing(b"b" * 400)).close()
        assert taken(tmp_path) == 400
        assert opened.read() == b"a" * 400


def test_a_piece_that_is_larger_than_was_thought(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)
    for name in "abc":
        spool.open(name, 10, writing(name.encode() * 400)).close()
        time.sleep(0.01)
        assert taken(tmp_path) <= 1000
    spool.open("b", 10, lambda sink: pytest.fail("it is there")).close()


def test_an_interrupted_fetch_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1000)

    def fails(sink: BinaryIO) -> None:
        sink.write(b"half")
        raise SourceUnavailable("the server is gone")

    with pytest.raises(SourceUnavailable, match="the server is gone"):
        spool.open("a", 400, fails)
    assert taken(tmp_path) == 0
    with spool.open("a", 400, writing(b"whole")) as opened:
        assert opened.read() == b"whole"


def _killed(folder: Path) -> None:
    def write(sink: BinaryIO) -> None:
        sink.write(b"half")
        sink.flush()
        os._exit(9)

    Spool(folder, 1000).open("a", 400, write)


def test_a_killed_process_leaves_room_for_others(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert taken(tmp_path) == 400  # reserved, and half written
    with Spool(tmp_path, 1000).open("b", 900, writing(b"b" * 900)) as opened:
        assert len(opened.read()) == 900
    assert taken(tmp_path) == 900


def test_many_threads_share_one_fetch(tmp_path: Path) -> None:
    spool, calls = Spool(tmp_path, 1000), list[str]()

    def slow(sink: BinaryIO) -> None:
        calls.append("a")
        time.sleep(0.2)
        sink.write(b"a" * 400)

    found: list[bytes] = []

    def read() -> None:
        with spool.open("a", 400, slow) as opened:
            found.append(opened.read())

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (calls, found) == (["a"], [b"a" * 400] * 6)


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    def write(sink: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        SourceUnavailable, match=r"the disk is full .*; free space there, lower data.streaming_disk_gib"
    ):
        Spool(tmp_path, 1000).open("a", 400, write)
    assert taken(tmp_path) == 0

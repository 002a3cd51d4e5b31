"""Files behind addresses: ranges, attempts, and one message for each way in which a server fails."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_vpt.data import addresses
from dist_vpt.data.addresses import (
    RangeReader,
    check_unchanged,
    expand,
    expand_braces,
    find_file,
    read_range,
    read_text_of,
    shown,
)
from dist_vpt.errors import DataError, SourceUnavailable
from tests.range_server import Server, serving

pytest.importorskip("aiohttp")
CONTENT = bytes(range(256)) * 8


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(addresses, "WAITS", (0.01, 0.01))
    with serving() as found:
        yield found


def test_ranges_alone_are_sent(server: Server) -> None:
    file = find_file(server.put("a.bin", CONTENT))
    assert (file.size, bool(file.version)) == (len(CONTENT), True)
    assert read_range(file, 100, 300) == CONTENT[100:300]
    assert read_range(file, 0, 10) == CONTENT[:10]
    assert server.sent == [("a.bin", 100, 300), ("a.bin", 0, 10)]


def test_a_reader_reads_blocks(server: Server) -> None:
    file = find_file(server.put("a.bin", CONTENT))
    reader = io.BufferedReader(RangeReader(file, block=512), 64)
    assert reader.read() == CONTENT
    assert server.bytes_sent() == len(CONTENT)
    reader.seek(-5, os.SEEK_END)
    assert reader.read(10) == CONTENT[-5:]


def test_a_local_file_is_read_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    file = find_file(str(tmp_path / "a.bin"))
    assert read_range(file, 100, 300) == CONTENT[100:300]
    check_unchanged(file)
    with pytest.raises(DataError, match="is a folder; name its files"):
        find_file(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(CONTENT + b"more")
    with pytest.raises(SourceUnavailable, match="has changed"):
        check_unchanged(file)


@pytest.mark.parametrize("status", [503, 500, 429])
def test_a_busy_server_is_asked_again(status: int, server: Server) -> None:
    file = find_file(server.put("a.bin", CONTENT))
    server.status, server.failures = status, 2
    assert read_range(file, 0, 10) == CONTENT[:10]
    server.failures = 4  # a HEAD that fails is tried as GET
    assert find_file(file.address) == file


def test_an_answer_that_ends_early_is_asked_for_again(server: Server) -> None:
    file = find_file(server.put("a.bin", CONTENT))
    server.cut = 2
    assert read_range(file, 0, 1000) == CONTENT[:1000]


def failing(server: Server, message: str, address: str | None = None) -> None:
    with pytest.raises(SourceUnavailable) as caught:
        read_range(find_file(address or server.put("a.bin", CONTENT)), 7, 100)
    assert message in str(caught.value), str(caught.value)
    assert str(caught.value).startswith(shown(address or f"{server.address}/a.bin"))
    assert "\n" not in str(caught.value)


def test_what_fails_is_one_message(server: Server) -> None:
    failing(server, "does not exist; correct the address", f"{server.address}/none.bin")
    server.status, server.failures = 403, 100
    failing(server, "may not be read (403); log in")
    server.status = 500
    failing(server, "cannot be fetched after 3 attempts (")
    server.failures, server.cut = 0, 100
    failing(server, "cannot be fetched after 3 attempts (")
    server.cut, server.ranges = 0, False
    failing(server, "the server sends whole files alone")


def test_a_server_that_is_gone(server: Server) -> None:
    with serving() as other:
        file = find_file(other.put("a.bin", CONTENT))
    with pytest.raises(SourceUnavailable, match=r"cannot be fetched after 3 attempts .*; check network and server"):
        read_range(file, 0, 10)
    with pytest.raises(SourceUnavailable, match=r"cannot be fetched after 3 attempts .*; check network and server"):
        find_file(file.address)


def test_a_file_that_changes(server: Server) -> None:
    file = find_file(server.put("a.bin", CONTENT))
    check_unchanged(file)
    server.put("a.bin", CONTENT[::-1])
    with pytest.raises(SourceUnavailable, match="has changed since this run found it"):
        check_unchanged(file)


def test_a_text_that_may_be_missing(server: Server) -> None:
    assert read_text_of(server.put("classes.txt", b"cat\ndog\n")) == "cat\ndog\n"
    assert read_text_of(f"{server.address}/none.txt") is None
    server.failures, server.status = 2, 503  # a server that is busy says nothing about the file
    assert read_text_of(f"{server.address}/classes.txt") == "cat\ndog\n"
    server.failures = 100
    with pytest.raises(SourceUnavailable, match=r"cannot be fetched after 3 attempts"):
        read_text_of(f"{server.address}/none.txt")


def test_a_scheme_in_capitals(server: Server) -> None:
    address = server.put("a.bin", CONTENT).replace("http", "HTTP")
    assert find_file(address).size == len(CONTENT)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("{x,y}/{0..1}", ["x/0", "x/1", "y/0", "y/1"]),
    ],
)
def test_braces(pattern: str, wanted: list[str]) -> None:
    assert expand_braces("key", pattern) == wanted


def test_patterns_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"key 'a-\{x\}': \{x\} is neither \{FIRST..LAST\} nor \{ONE,OTHER\}; fix"):
        expand_braces("key", "a-{x}")
    with pytest.raises(DataError, match=r"key 'a-\{9..2\}': \{9..2\} ends before it begins; write the smaller number"):
        expand_braces("key", "a-{9..2}")
    with pytest.raises(
        DataError, match=r"so \* and \? match nothing; number them, such as train-\{0000..0009\}.parquet"
    ):
        expand("key", "https://host/data", "a-*.parquet")
    with pytest.raises(DataError, match=r"key '\*.tar': matches no file in file://"):
        expand("key", f"file://{tmp_path}", "*.tar")
    (tmp_path / "b.tar").touch()
    (tmp_path / "a.tar").touch()
    assert expand("key", f"file://{tmp_path}", "*.tar") == [f"file://{tmp_path}/{name}.tar" for name in "ab"]


def test_messages_hold_no_password() -> None:
    assert shown("https://me:secret@host:8/a/b.tar?signature=secret") == "https://host:8/a/b.tar"
    assert shown("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert shown("ftp://me:secret@host/a.tar") == "ftp://host/a.tar"
    assert shown("https://[me:secret/a.tar") == "https://..."

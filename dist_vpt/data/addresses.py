"""Files that are read in place, by ranges of bytes: behind addresses (https, hf, s3, gs, ...), or on this machine.

Every request is tried again a few times, and fails with one message that names the address. A stop signal ends it, with
Interrupted. Nothing here writes.
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from dist_vpt.data.waiting import answer_to, pause
from dist_vpt.errors import DataError, Interrupted, SourceUnavailable, UserError
from dist_vpt.files import printable

BLOCK = 8 * 2**20  # bytes of a request where a file is read from its beginning to its end
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before a request is tried again
SILENCE = 20.0  # seconds without a byte, after which a request has failed
VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "md5",
    "Content-MD5",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "mtime",
)
REFUSED = (401, 403)  # statuses of HTTP
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
BRACES = re.compile(r"\{([^{}]*)\}")

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when it was found."""

    address: str  # or a path on this machine
    size: int  # bytes
    version: str  # what tells it from another content under this address

    def __str__(self) -> str:
        return shown(self.address)


def is_address(root: str | None) -> bool:
    """Whether a text is an address (scheme://...) and no path."""
    return root is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", root) is not None


def shown(address: str) -> str:
    """An address for people, without the passwords and signatures that it may hold."""
    if not is_address(address):
        return printable(address)
    try:
        parts = urlsplit(address)
    except ValueError:  # an address of nothing
        return f"{address.partition('://')[0]}://..."
    secret = parts.scheme in ("http", "https") or parts.password is not None
    host = parts.netloc.rpartition("@")[2] if secret else parts.netloc
    return f"{parts.scheme}://{host}{parts.path}"


def mistake_in_root(root: str | None) -> str:
    """What is wrong with ``data.root`` if it is an address, and the fix, or "".

    It is saved in run folders and adapter files, so it must hold no secrets.
    """
    if root is None or not is_address(root):
        return ""
    try:
        parts = urlsplit(root)
        parts.port  # noqa: B018 (raises)
    except ValueError:
        return "its host or port cannot be read; correct the address"
    if parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None):
        return (
            "holds a login, which would be saved with the run; leave it out, and give it to the library that logs in "
            "(https: a line of ~/.netrc)"
        )
    if parts.scheme in ("http", "https") and (parts.query or parts.fragment):
        return "goes on after its path (? or #), and names of files are put behind it; give the address of a folder"
    return ""


def find_file(address: str) -> RemoteFile:
    """Ask for a file's size and version."""
    system, path = _open(address)
    listed = {"refresh": True} if address.startswith(("s3://", "s3a://")) else {}  # or it answers from a listing
    info = _request(address, lambda: system.info(path, **listed))
    if info["type"] == "directory":
        raise DataError(f"{shown(address)}: is a folder; name its files")
    if info.get("size") is None:
        raise SourceUnavailable(
            f"{shown(address)}: the server does not say how large the file is, and files are read by ranges of bytes; "
            "download it, or use a server that does"
        )
    version = " ".join(str(info[key]) for key in VERSIONS if info.get(key))
    return RemoteFile(address, int(info["size"]), version)


def check_unchanged(file: RemoteFile) -> None:
    """Raises SourceUnavailable where an address has got another content since the file was found."""
    if not _is_pinned(file.address) and find_file(file.address) != file:
        raise SourceUnavailable(
            f"{file}: has changed since this run found it, so what is known of it is void; start again, and keep files "
            "under their addresses as they are while runs read them"
        )


def read_range(file: RemoteFile, start: int, end: int) -> bytes:
    """The bytes from ``start`` up to ``end``."""
    system, path = _open(file.address)
    scheme = urlsplit(file.address).scheme if is_address(file.address) else ""

    def read() -> bytes:
        if scheme not in ("hf", "http", "https"):
            found: bytes = system.cat_file(path, start=start, end=end)
        else:  # whose cat_file would read more
            with system.open(path, "rb", size=file.size, cache_type="none") as opened:
                opened.seek(start)
                found = opened.read(end - start)
        if len(found) != end - start:
            raise EOFError(f"{len(found):,} of {end - start:,} bytes came")
        return found

    return _request(file.address, read)


class RangeReader(io.RawIOBase):
    """A file as an object of Python, which keeps the block that was fetched last."""

    def __init__(self, file: RemoteFile, block: int = BLOCK, *, kept: bytes = b"", first: int = 0):
        """``kept``: a block that has been read already, which begins at byte ``first``."""
        self._file, self._block = file, block
        self._at, self._first, self._kept = 0, first, bytearray(kept)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._file.size - self._at)
        if wanted <= 0:
            return 0
        if not self._first <= self._at < self._first + len(self._kept):
            self._fetch(wanted)
        begin = self._at - self._first
        part = self._kept[begin : begin + wanted]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self, wanted: int) -> None:
        """Replace what is kept by a block from the current place on, of at least so many bytes."""
        self._first = self._at
        end = min(self._at + max(self._block, wanted), self._file.size)
        self._kept = bytearray(read_range(self._file, self._at, end))


def read_text_of(address: str) -> str | None:
    """The text of a small file, or None where there is none."""
    system, path = _open(address)

    def is_there() -> bool:
        try:
            system.info(path)
        except Exception as error:
            if _is_final(error):
                return False
            raise
        return True

    if not _request(address, is_there):
        return None
    file = find_file(address)
    return read_range(file, 0, file.size).decode(errors="replace")


def expand(key: str, root: str, pattern: str) -> list[str]:
    """The addresses that a pattern below a root means: {0000..0009} and {a,b}, and * and ? where a server lists files.

    ``key``: of the pattern in a recipe. Raises DataError where it matches nothing.
    """
    addresses = [f"{pinned(root).rstrip('/')}/{each}" for each in expand_braces(key, pattern)]
    if not re.search(r"[*?]", pattern):
        return addresses
    if urlsplit(root).scheme in ("http", "https"):
        raise DataError(
            f"{key} {pattern!r}: {shown(root)} does not list its files, so * and ? match nothing; number them, such as "
            f"train-{{0000..0009}}{PurePosixPath(pattern).suffix}"
        )
    found = [each for address in addresses for each in list_files(address)]
    if not found:
        raise DataError(f"{key} {pattern!r}: matches no file in {shown(root)}")
    return found


def list_files(pattern: str) -> list[str]:
    """The files that match an address with * and ?, sorted, on a server that lists files."""
    system, path = _open(pattern)
    return sorted(system.unstrip_protocol(each) for each in _request(pattern, lambda: system.glob(path)))


def expand_braces(key: str, pattern: str) -> list[str]:
    """What a pattern with {first..last} and {one,other} stands for. Raises DataError for other braces."""
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers is None and "," not in found[1]:
        raise DataError(f"{key} {pattern!r}: {found[0]} is neither {{FIRST..LAST}} nor {{ONE,OTHER}}; fix the pattern")
    if numbers is not None and int(numbers[2]) < int(numbers[1]):
        raise DataError(f"{key} {pattern!r}: {found[0]} ends before it begins; write the smaller number first")
    if numbers is None:
        choices = found[1].split(",")
    else:
        first, last = numbers.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    head, rest = pattern[: found.start()], expand_braces(key, pattern[found.end() :])
    return [head + choice + each for choice, each in itertools.product(choices, rest)]


def pinned(root: str) -> str:
    """A root on the Hugging Face hub with its newest commit, so that it stays what it is; any other as it is."""
    if urlsplit(root).scheme != "hf" or _is_pinned(root):
        return root
    system, path = _open(root)
    found = _request(root, lambda: system.resolve_path(path))
    if not hasattr(found, "repo_id"):  # a bucket, which has no commits
        return root
    about = _request(
        root, lambda: system._api.repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision)
    )
    kind = f"{found.repo_type}s/" if found.repo_type in ("dataset", "space") else ""
    return f"hf://{kind}{found.repo_id}@{about.sha}" + (f"/{found.path_in_repo}" if found.path_in_repo else "")


def _is_pinned(address: str) -> bool:
    return re.match(r"hf://[^@]*@[0-9a-f]{40}(/|$)", address) is not None


def _open(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    return _opened(address, os.getpid())


@lru_cache(maxsize=1024)
def _opened(address: str, process: int) -> tuple[Any, str]:  # a file system's connections do not outlive a fork
    try:
        import fsspec
    except ImportError:
        raise UserError("addresses need the package fsspec; pip install 'dist-vpt[hf]'") from None
    scheme = urlsplit(address).scheme if is_address(address) else "file"
    options: dict[str, Any] = {}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            # Of a piece any time may be taken, but not without a byte. trust_env: proxies.
            patience = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            options = {"client_kwargs": {"timeout": patience, "trust_env": True}}
        lower = f"{scheme}{address[len(scheme) :]}" if is_address(address) else address  # HTTPS:// is https://
        system, path = fsspec.core.url_to_fs(lower if scheme != "file" else str(Path(lower)), **options)
    except ImportError:
        package = PACKAGES.get(scheme, f"that fsspec names for {scheme}")
        wanted = "'dist-vpt[hf]'" if scheme in ("http", "https") else package
        raise UserError(f"{shown(address)}: needs a package that is missing; pip install {wanted}") from None
    except ValueError as error:
        raise DataError(f"{shown(address)}: {error}; use https://, s3://, gs:// or hf://") from None
    return system, path


def _request(address: str, ask: Callable[[], Result]) -> Result:
    """The answer, after several attempts where that may help. Raises SourceUnavailable."""
    for attempt, seconds in enumerate((*WAITS, None), 1):
        try:
            return answer_to(ask, shown(address))
        except Interrupted:
            raise
        except Exception as error:  # of many families: sockets, aiohttp, httpx, botocore, the hub
            if seconds is None or _is_final(error):
                _fail(address, error, attempt)
        pause(seconds, shown(address))
    raise AssertionError


def _is_final(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's for any failed request
        cause = error.__cause__
        return _status(cause) is not None and not _may_pass(cause)
    found = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError)
    return not _may_pass(error) and (isinstance(error, found) or _status(error) is not None)


def _may_pass(error: BaseException) -> bool:
    """Whether a later request may succeed: the server is busy, or out of order."""
    status = _status(error)
    return status is not None and (status >= 500 or status in (408, 429))


def _status(error: BaseException) -> int | None:
    found = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _fail(address: str, error: Exception, attempts: int) -> NoReturn:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    status, name = _status(cause), shown(address)
    if status in REFUSED or isinstance(cause, PermissionError):
        reason = (
            f"may not be read ({status or cause}); log in (hf auth login, the variables of your cloud, ~/.netrc), or "
        )
        reason += "use an address that needs no login"
    elif status == 404 or isinstance(cause, FileNotFoundError):
        reason = "does not exist; correct the address"
    elif "range request" in str(cause):
        reason = "the server sends whole files alone, and files are read by ranges of bytes; download the file, or use "
        reason += "a server that answers range requests"
    else:
        text, tried = " ".join(_lines(cause)), f" after {attempts} attempts" if attempts > 1 else ""
        reason = f"cannot be fetched{tried} ({text[:300]}); check network and server, then repeat the command "
        reason += "(run.resume=auto goes on from the newest state)"
    raise SourceUnavailable(f"{name}: {reason}") from None


def _lines(error: BaseException) -> Iterator[str]:
    yield type(error).__name__
    yield from filter(None, map(str.strip, str(error).splitlines()))

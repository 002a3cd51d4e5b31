"""A web server on this machine that answers ranges of bytes, counts them, and fails as it is told to."""

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Server:
    """What the server holds, and what it was asked: (path, first byte, end) of each range that it sent."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by path, without the first slash
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    ranges: bool = True
    failures: int = 0  # requests that are answered by status
    status: int = 503
    gone: bool = False
    cut: int = 0  # answers that end in the middle
    silent_after: int | None = None  # ranges, after which no request is answered
    unanswered: int = 0  # requests since then

    def put(self, name: str, content: bytes) -> str:
        self.files[name] = content
        return f"{self.address}/{name}"

    @property
    def silent(self) -> bool:
        return self.silent_after is not None and len(self.sent) >= self.silent_after

    def bytes_sent(self, name: str | None = None) -> int:
        return sum(end - first for path, first, end in self.sent if name in (None, path))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: Server

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        state = self.server_state
        if state.silent:
            state.unanswered += 1
        while state.silent and not state.gone:
            time.sleep(0.02)
        if state.gone:
            self.close_connection = True
            return None
        if state.failures:
            state.failures -= 1
            return self._answer(state.status, b"")
        name = unquote(urlsplit(self.path).path).removeprefix("/")
        content = state.files.get(name)
        if content is None:
            return self._answer(404, b"")
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if asked is None or not state.ranges:
            return self._answer(200, content, ETag=tag, **({"Accept-Ranges": "bytes"} if state.ranges else {}))
        first, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
        state.sent.append((name, first, end))
        return self._answer(
            206, content[first:end], ETag=tag, **{"Content-Range": f"bytes {first}-{end - 1}/{len(content)}"}
        )

    do_HEAD = do_GET

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        state = self.server_state
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if state.cut and status == 206:
            state.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that are gone."""

    def handle_error(self, *_: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""
    state = Server()
    handler = type("HandlerOfThisServer", (Handler,), {"server_state": state})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        state.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            state.gone = True  # for connections that stay open
            server.shutdown()
            thread.join()

"""An HTTP server in a thread that breaks off, changes its mind and answers wrongly on request."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What it serves by path, how it misbehaves, and the requests it got."""

    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)  # bytes of the next answers, one each, before the line breaks
    statuses: list[int] = field(default_factory=list)  # of the next answers
    ranges: bool = True
    version: str | None = '"v1"'
    kind: str = "application/octet-stream"
    with_length: bool = True
    requests: list[dict[str, str]] = field(default_factory=list)  # path and headers of every request
    url: str = ""

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append({"path": handler.path, **dict(handler.headers.items())})
        if self.statuses and (status := self.statuses.pop(0)) != 200:
            return handler.send_error(status)
        content = self.files.get(handler.path.lstrip("/"))
        if content is None:
            return handler.send_error(404)
        start = self._start(handler)
        if start is not None and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(200 if start is None else 206)
        if start is not None:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = content[start or 0 :]
        if self.with_length:
            handler.send_header("Content-Length", str(len(body)))
        if self.version:
            handler.send_header("ETag", self.version)
        handler.send_header("Content-Type", self.kind)
        handler.end_headers()
        handler.wfile.write(body[: self.break_after.pop(0)] if self.break_after else body)
        return None

    def _start(self, handler: BaseHTTPRequestHandler) -> int | None:
        """The first byte requested; None where all is to be sent."""
        requested = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if not requested or not self.ranges or (condition is not None and condition != self.version):
            return None
        return int(requested[1])


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.respond(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up is part of the tests."""

    http = Quiet(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()

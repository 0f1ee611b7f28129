"""A web server for the tests, on loopback, with ranges of bytes, that misbehaves as it is told."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("stall", "cut", "short", "long", "wrong", "noise", "500", "refuse")


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` says what happens to the next requests of ranges, and `always` to all of them."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.faults, self.always = folder, list[str](), ""
        self.missing = 404  # what it says of a file that does not exist
        self.ranges: list[str] = []  # "NAME FIRST-LAST" of each request of a range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that has given up is no fault of a test."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        path = self.server.folder / name
        if not path.is_file():
            return self.send(self.server.missing, b"")
        data, status = path.read_bytes(), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        fault = ""
        if asked:
            self.server.ranges.append(f"{name} {asked[1]}-{asked[2]}")
            first, last = int(asked[1]), int(asked[2])
            if first >= len(data):
                return self.send(416, b"")
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
            whole, data, status = data, data[first : last + 1], 206
            if fault == "long":  # a server that knows no ranges
                data, status = whole, 200
        if fault == "stall":
            time.sleep(30)
        elif fault == "refuse":
            return self.send(403, b"")
        elif fault == "500":
            return self.send(500, b"")
        elif fault == "cut":
            return self.send(status, data[: len(data) // 2], length=len(data))
        elif fault == "short":
            data = data[: len(data) // 2]
        elif fault == "wrong":  # of the right length
            data = bytes(len(data))
        elif fault == "noise":  # one bit in the middle
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        return self.send(status, data if with_body else b"", length=len(data))

    def send(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        self.wfile.write(body)
        if length is not None and len(body) < length and self.command == "GET":
            self.close_connection = True


@contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[Server]:
    """The server in a thread of this process."""
    server = Server(folder, port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":  # in a process of its own, which can be killed
    Server(Path(sys.argv[1]), int(sys.argv[2])).serve_forever()

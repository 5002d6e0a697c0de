"""Serves the page and its four calls over HTTP with the standard library, one thread per request."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from service import RefusedError, Service

from simplexfix.data import ImageFileError

HERE = Path(__file__).resolve().parent
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
LARGEST = 8_000_000  # bytes of an upload
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:"


class Handler(BaseHTTPRequestHandler):
    timeout = 20  # seconds without a byte until a connection is closed
    server: Server

    def do_GET(self) -> None:
        if self.path in FILES:
            name, kind = FILES[self.path]
            self._answer(200, kind, (HERE / name).read_bytes())
        elif self.path == "/status":
            self._json(200, self.server.service.status())
        else:
            named = re.fullmatch(r"/drawings/([0-9]{1,9})\.png", self.path)
            drawing = self.server.service.drawing(int(named[1])) if named else None
            if drawing is None:
                self._error(404, "there is no such page")
            else:
                self._answer(200, "image/png", drawing, keep=True)

    def do_POST(self) -> None:
        service = self.server.service
        changes = {"/upgrade": service.upgrade, "/rollback": service.rollback, "/stop": service.stop}
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != self.headers.get("Host"):
            self._error(403, "requests come from the page itself")
        elif self.path == "/search":
            content = self._body()
            if content is not None:
                self._search(content)
        elif self.path in changes:
            try:
                changes[self.path]()
                self._json(200, service.status())
            except RefusedError as error:
                self._error(409, str(error))
        else:
            self._error(404, "there is no such call")

    def _search(self, content: bytes) -> None:
        try:
            self._json(200, self.server.service.search(content))
        except ImageFileError:
            self._error(400, "this is not an image that can be read: give a PNG, JPEG, GIF or WebP file")
        except RefusedError as error:
            self._error(400, str(error))

    def _body(self) -> bytes | None:
        """Returns the body of the request, or None after an error response."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self._error(411, "Content-Length must say how long the image is")
        elif int(length) > LARGEST:
            self._error(413, f"an image may have {LARGEST // 1_000_000} MB")
        elif not int(length):
            self._error(400, "send an image file")
        else:
            content = self.rfile.read(int(length))
            if len(content) == int(length):
                return content
            self._error(400, "the image did not arrive whole")
        return None

    def _json(self, code: int, content: Any) -> None:
        self._answer(code, "application/json", json.dumps(content).encode())

    def _error(self, code: int, text: str) -> None:
        self._json(code, {"error": text})

    def _answer(self, code: int, kind: str, content: bytes, *, keep: bool = False) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "max-age=86400" if keep else "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the terminal shows only the address."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, service: Service, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self.service = service


def serve(folder: Path, host: str, port: int) -> None:
    service = Service(folder)
    with Server(service, host, port) as server:
        print(f"http://{host}:{server.server_port}/ searches until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped; run `serve` again to continue")
        finally:
            service.close()

"""A Hugging Face hub on this machine: the endpoints by which huggingface_hub creates, pushes and downloads models.

It keeps repositories in memory.  It takes weights by LFS (basic transfer) and the other files inside the commit, as the
real hub does without Xet.  A request with a token may write for every owner except "stranger".
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """The hub.

    Attributes:
        repositories: by "owner/name", the files of each commit by its hash, oldest first.
        large: contents of weights by their SHA-256.
        requests: (method, path) of every request.
        failing: paths of files whose content cannot be downloaded; "PUT" if weights cannot be uploaded.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failing: set[str] = set()

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        commits = self.repositories[repository]
        found = hashlib.sha1(repr((len(commits), sorted(files.items()))).encode()).hexdigest()
        commits[found] = files
        return found


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "POST" and "Authorization" not in self.headers:
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name.startswith("stranger/"):
                return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
            new = name not in self.server.repositories
            if new:
                self.server.repositories[name] = {}
                self.server.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self._send(200 if new else 409, {"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path.startswith("/lfs/"):  # uploads have no token, as for the real hub's storage
            if "PUT" in self.server.failing:
                return self._send(400, {"error": "Bad request"})  # the client retries a 500 for half a minute
            self.server.large[path.removeprefix("/lfs/")] = content
            self._send(200, {})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            self._send(200, {"transfer": "basic", "objects": objects})
        else:
            self._of_repository(path, content)
        return None

    def _of_repository(self, path: str, content: bytes) -> None:
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, action, revision = "/".join(parts[:2]), *(parts[2:4] or ["revision", "main"])
        commits = self.server.repositories.get(name)
        if commits is None:
            return self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if action == "resolve":
            return self._file(commit, files, "/".join(parts[4:]))
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, {"id": name, "sha": commit, "private": False, "siblings": siblings})
        if action == "tree":
            return self._send(200, [{"type": "file", "path": f, "size": len(b), **_ids(b)} for f, b in files.items()])
        if action == "preupload":
            asked = [entry["path"] for entry in json.loads(content)["files"]]
            mode = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in asked}
            return self._send(
                200, {"files": [{"path": f, "uploadMode": mode[f], "shouldIgnore": False} for f in asked]}
            )
        assert action == "commit", path
        files = dict(files)
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.server.commit(name, files)
        return self._send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _file(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if path in self.server.failing and self.command == "GET":
            return self._send(500, {"error": "Internal error"})
        return self._send(200, files[path], {"ETag": f'"{_ids(files[path])["oid"]}"', "X-Repo-Commit": commit})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _ids(content: bytes) -> dict[str, str]:
    return {"oid": hashlib.sha1(content).hexdigest()}

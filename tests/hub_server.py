"""The Hugging Face hub on loopback, as far as huggingface_hub asks it: list a repository, fetch files, take uploads."""

import base64
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REVISION = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """`files` has {"owner/name": {file: content}}. `behaviours` are taken one a download, then it is honest."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.behaviours: list[str] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.tokens: set[str | None] = set()
        self.visibility: dict[str, str | None] = {}  # what was asked for; None: as the owner's settings have it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str | None]:
        """The Range headers of the downloads so far."""
        return [asked for method, path, asked in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@contextmanager
def asked(folder: Path) -> Iterator[Hub]:
    """A hub that this process's huggingface_hub asks; what it fetches lies in `folder`."""
    from huggingface_hub import constants, file_download

    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # before 1.0 the latter has its own address
            patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)
        patch.setattr(constants, "ENDPOINT", hub.url)  # HF_ENDPOINT is read when it is imported
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("GROUNDINGDINO_CACHE", str(folder / "cache"))
        for name in ("GROUNDINGDINO_OFFLINE", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        yield hub


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if "resolve" in parts:
            self.send_file("/".join(parts[:2]), "/".join(parts[4:]))
        elif parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.files:
            self.send_listing("/".join(parts[2:4]), "tree" in parts)
        else:
            self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def send_listing(self, repository: str, tree: bool) -> None:
        files = self.server.files[repository]
        if tree:
            self.send_json([{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in files.items()])
            return
        siblings = [{"rfilename": name} for name in files]
        self.send_json({"id": repository, "modelId": repository, "sha": REVISION, "siblings": siblings})

    def send_file(self, repository: str, name: str) -> None:
        content = self.server.files.get(repository, {}).get(name)
        if content is None:
            self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": REVISION}
        if self.command == "HEAD":
            self.begin(200, len(content), headers)
            return
        behaviour = self.server.behaviours.pop(0) if self.server.behaviours else ""
        if behaviour.isdecimal():
            self.send_json({"error": "try later"}, int(behaviour))
            return
        if behaviour == "wrong file":
            content = b"<html>moved</html>".ljust(len(content))
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        rest = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.begin(206 if start else 200, len(rest), headers)
        if behaviour == "breaks off":
            self.wfile.write(rest[: len(rest) // 2])
            self.close_connection = True
        elif behaviour == "slow":
            for piece in range(0, len(rest), len(rest) // 5 + 1):
                self.wfile.write(rest[piece : piece + len(rest) // 5 + 1])
                time.sleep(0.1)
        else:
            self.wfile.write(rest)

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(("POST", path, None))
        self.server.tokens.add(self.headers.get("Authorization"))
        if path.endswith("/create"):
            wanted = json.loads(body)
            repository = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] == "not-mine":
                self.send_json({"error": "You don't have the rights to create a model there"}, 403)
                return
            self.server.files.setdefault(repository, {})
            older = {None: None, True: "private", False: "public"}[wanted.get("private")]
            self.server.visibility[repository] = wanted.get("visibility", older)
            self.send_json({"url": f"{self.server.url}/{repository}", "id": repository})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.send_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[repository][line["value"]["path"]] = content
            url = f"{self.server.url}/{repository}/commit/{REVISION}"
            self.send_json({"success": True, "commitOid": REVISION, "commitUrl": url, "hookOutput": ""})
        else:
            self.send_json({})  # e.g. whether the card's header is valid

    def begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.begin(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

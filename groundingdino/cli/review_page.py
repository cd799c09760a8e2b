"""The page of `groundingdino label --review DIR`: accept and reject labels in the browser. Standard library only.

Works without internet access, and for programs on this machine alone: what changes something needs a token that only
the page has, and requests under another host's name are refused. Names and file names are data, never HTML; images are
asked for by their number in the run's list and served as newly encoded JPEGs, so no file is served as it is.
"""

import json
import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import parse_qs, urlsplit

import msgspec
import torch

from groundingdino.cli.demo import check_address
from groundingdino.cli.label import labels_of
from groundingdino.cli.label_output import LabelFormat, Labelled, Labels, write_labels
from groundingdino.data.formats.files import read_json
from groundingdino.inference.image_source import ImageRef, open_ref
from groundingdino.inference.label_store import LabelRun
from groundingdino.inference.labelling import Choice, Chooser
from groundingdino.inference.results import to_json
from groundingdino.inference.vocabulary import Name, Vocabulary
from groundingdino.structures import Detections

PAGE = Path(__file__).with_name("review.html")
IMAGES_PER_PAGE = 12
LONGEST_SIDE = 1280  # pixels of a served picture
MOST_BYTES = 1 << 20  # of a request
Key = tuple[int, str, tuple[float, ...]]  # image, name, box


class _Verdict(msgspec.Struct):
    """One line of verdicts.jsonl; of lines about one box the last counts."""

    position: int
    boxes: list[dict[str, Any]]  # name and box of each
    accepted: bool | None  # None: undecided again


class _Form(msgspec.Struct):
    """What is asked for by the button that writes."""

    format: LabelFormat


class Review:
    """The labels of a run with what was decided about them.

    Raises:
        ValueError: the folder holds no finished run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, LabelRun(folder)
        kept = read_json(folder / "choice.json", dict[str, Any])
        vocabulary = Vocabulary(tuple(msgspec.convert(kept["names"], list[Name])))
        asked = self.run.manifest.asked
        self.labels = labels_of(self.run, Chooser(asked["prompts"], vocabulary, Choice(**kept["choice"])))
        self._verdicts: dict[Key, bool | None] = {}
        self._lock = threading.Lock()
        path = folder / "verdicts.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            self._note(msgspec.json.decode(line, type=_Verdict))

    def _note(self, verdict: _Verdict) -> None:
        for one in verdict.boxes:
            self._verdicts[verdict.position, one["name"], tuple(one["box"])] = verdict.accepted

    def decide(self, body: bytes) -> None:
        """Keep a verdict. ValueError if it is none."""
        verdict = msgspec.json.decode(body, type=_Verdict)
        with self._lock:
            self._note(verdict)
            with open(self.folder / "verdicts.jsonl", "ab") as file:
                file.write(msgspec.json.encode(verdict) + b"\n")

    def rows(self, image: Labelled) -> list[dict[str, Any]]:
        """Name, box, score and verdict of each label."""
        rows = to_json(image.found)
        for row in rows:
            row["accepted"] = self._verdicts.get((image.position, row["name"], tuple(row["box"])))
        return rows

    def page(self, query: dict[str, str]) -> dict[str, Any]:
        """The next images with labels of a name and of scores in a range. ValueError for numbers that are none."""
        low, high, start = float(query.get("low") or 0), float(query.get("high") or 1), int(query.get("start") or 0)
        name, undecided = query.get("name", ""), bool(query.get("open"))
        found: list[dict[str, Any]] = []
        for image in self.labels.images(start):
            boxes = [
                row
                for row in self.rows(image)
                if name in ("", row["name"])
                and low <= row["score"] <= high
                and not (undecided and row["accepted"] is not None)
            ]
            if boxes and len(found) == IMAGES_PER_PAGE:
                return {"images": found, "next": image.position}
            if boxes:
                size = {"width": image.width, "height": image.height}
                found.append({"position": image.position, "name": image.ref.name, **size, "boxes": boxes})
        return {"images": found, "next": None}

    def picture(self, position: int) -> bytes:
        """An image as JPEG. ValueError for a number that is none, or an image that cannot be read any more."""
        size = self.run.manifest.shard_size
        if not 0 <= position < self.run.manifest.images:
            raise ValueError(f"no image {position}")
        refs: dict[int, ImageRef] = dict(self.run.refs(position // size))
        image = open_ref(refs[position])
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = BytesIO()
        image.save(file, "jpeg", quality=88)
        return file.getvalue()

    def write(self, to: LabelFormat) -> dict[str, Any]:
        """Write the accepted boxes of all images about which anything was decided, into accepted/."""
        counts = {"images": 0, "boxes": 0}

        def accepted(start: int = 0) -> Iterator[Labelled]:
            counts.update(images=0, boxes=0)
            reviewed = {position for position, _, _ in self._verdicts}
            for image in self.labels.images(start):
                if image.position in reviewed:
                    kept = [number for number, row in enumerate(self.rows(image)) if row["accepted"]]
                    counts["images"] += 1
                    counts["boxes"] += len(kept)
                    yield replace(image, found=_taken(image.found, kept))

        folder = self.folder / "accepted"
        folder.mkdir(exist_ok=True)
        with self._lock:
            path = write_labels(Labels(self.labels.names, self.labels.root, accepted), to, folder)
        return {**counts, "path": str(path)}


def _taken(found: Detections, rows: list[int]) -> Detections:
    index = torch.tensor(rows, dtype=torch.long)
    names = tuple(found.names[row] for row in rows)
    return Detections(found.boxes[index], found.scores[index], found.labels[index], names)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    def __init__(self, review: Review, token: str, *arguments: Any) -> None:
        self.review, self.token = review, token
        super().__init__(*arguments)

    def do_GET(self) -> None:  # the name that http.server calls
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if not self._is_for_us():
            return
        if url.path == "/":
            self._send_page()
        elif url.path == "/api/about":
            self._answer(lambda: {"names": self.review.labels.names, "formats": get_args(LabelFormat)})
        elif url.path == "/api/images":
            self._answer(lambda: self.review.page(query))
        elif url.path.startswith("/image/") and url.path[7:].isdecimal() and len(url.path) < 20:
            self._send_picture(int(url.path[7:]))
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"problem": "there is no such thing here"})

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        if not secrets.compare_digest(self.headers.get("X-Token", "").encode(), self.token.encode()):
            self._send_json(HTTPStatus.FORBIDDEN, {"problem": "this page is out of date: load it again"})
        elif not length.isdecimal() or int(length) > MOST_BYTES:
            self._send_json(HTTPStatus.BAD_REQUEST, {"problem": f"a request has at most {MOST_BYTES} bytes"})
        elif self.path == "/api/verdict":
            body = self.rfile.read(int(length))
            self._answer(lambda: self.review.decide(body))
        elif self.path == "/api/write":
            body = self.rfile.read(int(length))
            self._answer(lambda: self.review.write(msgspec.json.decode(body, type=_Form).format))
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"problem": "there is no such thing here"})

    def _is_for_us(self) -> bool:
        """Whether the browser asked for this server by a name of this machine, or it listens for others, too."""
        host, port, *_ = cast(tuple[str, int], self.server.server_address)
        asked = self.headers.get("Host", "")
        if host != "127.0.0.1" or asked in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return True
        self._send_json(HTTPStatus.FORBIDDEN, {"problem": "asked for by another name"})
        return False

    def _answer(self, work: Any) -> None:
        try:
            self._send_json(HTTPStatus.OK, work())
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._send_json(HTTPStatus.BAD_REQUEST, {"problem": str(error)[:300]})

    def _send_picture(self, position: int) -> None:
        try:
            content = self.review.picture(position)
        except ValueError as error:
            self._send_json(HTTPStatus.NOT_FOUND, {"problem": str(error)[:300]})
        else:
            self._send(HTTPStatus.OK, "image/jpeg", content)

    def _send_page(self) -> None:
        nonce = secrets.token_hex(16)
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).replace("TOKEN", self.token)
        policy = f"default-src 'none'; img-src 'self'; connect-src 'self'; script-src 'nonce-{nonce}'; "
        policy += f"style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", page.encode(), {"Content-Security-Policy": policy})

    def _send_json(self, status: HTTPStatus, content: Any) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, kind: str, content: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "X-Content-Type-Options": "nosniff"}
        for name, value in {**headers, "Cache-Control": "no-store", **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """No line for each request."""


def build_server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """The server, not yet serving; port 0 takes any that is free. ValueError if the folder holds no finished run."""
    return ThreadingHTTPServer((host, port), partial(_Handler, Review(folder), secrets.token_hex(16)))


def serve(folder: Path, host: str, port: int) -> int:
    """Serve until interrupted. The exit code."""
    check_address(host, port)
    server = build_server(folder, host, port)
    print(f"review the labels of {folder} at http://{host}:{port}/ (Ctrl-C stops it)", flush=True)
    with server:
        server.serve_forever()
    return 0

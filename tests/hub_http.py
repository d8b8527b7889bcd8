"""HTTP below the small Hub: calls, answers, and the ways in which a request can be made to fail."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

from hub_storage import PIECE

if TYPE_CHECKING:
    from hub_server import HubServer


@dataclass
class Request:
    """One request as the server saw it; bodies are kept because secrets in them would be a fault of the client.

    What goes to the storage of large files is not kept, and a request that was broken off has status 0.
    """

    method: str
    path: str
    status: int
    user: str | None
    body: bytes = field(repr=False)


@dataclass
class Call:
    """One request on its way to a route."""

    headers: Mapping[str, str]
    body: bytes = b""
    upload: Path | None = None  # where the body of a PUT lies
    user: str | None = None
    query: Mapping[str, list[str]] = field(default_factory=dict)

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    """What goes back: bytes, or a stretch of a file."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    stretch: range = range(0)

    @property
    def size(self) -> int:
        """Return the bytes of the body."""
        return len(self.stretch) if self.file else len(self.body)

    def send(self, out: BinaryIO, share: float = 1.0) -> None:
        """Write this share of the body."""
        if self.file is None:
            out.write(self.body[: int(share * len(self.body))])
            return
        left = int(share * len(self.stretch))
        with self.file.open("rb") as file:
            file.seek(self.stretch.start)
            while left > 0 and (piece := file.read(min(PIECE, left))):
                out.write(piece)
                left -= len(piece)


@dataclass
class Failure:
    """How one request is to fail; see `HubServer.fail`."""

    method: str
    fragment: str
    status: int
    how: str
    headers: dict[str, str]


class RefusalError(Exception):
    """Raised anywhere below a route to end it with an error answer."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.answer = json_answer({"error": message}, status)
        self.answer.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer.headers |= headers or {}


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


def handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # both clients keep connections open

        def _serve(self) -> None:
            failure = hub.failure(self.command, self.path)
            breaks = failure is not None and failure.how == "break"
            size = int(self.headers.get("Content-Length") or 0)
            if breaks and (size or self._chunked()):
                self.rfile.read(max(1, size // 2))
                hub.note(self.command, self.path, 0)
                return self._hang_up()
            call = Call(self.headers)
            if self.command == "PUT":
                call.upload = hub.folder / f"incoming-{uuid4().hex}"
                with call.upload.open("wb") as file:
                    self._read_into(file, size)
            else:
                buffer = io.BytesIO()
                self._read_into(buffer, size)
                call.body = buffer.getvalue()
            answer = hub.answer(self.command, self.path, call, failure)
            if failure is not None and failure.how == "spoil":
                answer = Answer(answer.status, bytes(answer.size), answer.headers)
            if failure is not None and failure.how == "lose":
                return self._hang_up()
            self._reply(answer, share=0.5 if breaks else 1.0)
            return self._hang_up() if breaks else None

        def _reply(self, answer: Answer, share: float) -> None:
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(answer.size)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                answer.send(self.wfile, share)

        def _hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True

        def _chunked(self) -> bool:
            return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

        def _read_into(self, file: BinaryIO, size: int) -> None:
            if not self._chunked():
                while size > 0 and (piece := self.rfile.read(min(PIECE, size))):
                    file.write(piece)
                    size -= len(piece)
                return
            while size := int(self.rfile.readline().split(b";")[0], 16):
                file.write(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()

        def log_message(self, *_: object) -> None:
            """Stay silent: tests read `requests`."""

    for verb in ("GET", "HEAD", "POST", "PUT"):
        setattr(Handler, f"do_{verb}", Handler._serve)
    return Handler

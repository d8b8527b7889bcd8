"""A small Hub for tests: the HTTP protocol that the real `huggingface_hub` client speaks, both generations of it.

Repositories live in memory. Point a client at it by `HF_ENDPOINT` in a process of its own (`HubServer.environment`),
because `huggingface_hub` reads its environment when it is imported.

Example:
    >>> with HubServer() as hub:
    ...     subprocess.run([sys.executable, "client.py"], env=hub.environment(tmp_path, token=hub.token))
    ...     hub.files("tester/model")  # {"config.json": b"...", ...}
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (
    ".safetensors",
    ".onnx",
    ".onnx_data",
    ".bin",
    ".pt",
    ".png",
)  # what the Hub's .gitattributes sends there
FIRST_COMMIT = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
REPO_NAME = re.compile(r"([\w.-]+/)?[\w.-]{1,96}")


@dataclass
class Request:
    """One request as the server saw it; bodies are kept because secrets in them would be a fault of the client."""

    method: str
    path: str
    status: int
    user: str | None
    body: bytes = field(repr=False)


@dataclass
class Commit:
    """One commit: all files of the repository after it."""

    files: dict[str, bytes]
    message: str
    oid: str


@dataclass
class Repo:
    """A model repository: its branches, each a list of commits, oldest first."""

    name: str
    private: bool
    branches: dict[str, list[Commit]]


@dataclass
class Answer:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class RefusalError(Exception):
    """Raised anywhere below a route to end it with an error answer."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.answer = _json({"error": message}, status)
        self.answer.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class HubServer:
    """The server and what it stores; use it as a context manager.

    Args:
        users: Token to user name; a user may write under the own name only.
    """

    def __init__(self, users: Mapping[str, str] | None = None) -> None:
        self.users = dict(users or {"hf_TestTokenTestTokenTestToken": "tester"})
        self.token = next(iter(self.users))
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # large files by SHA-256
        self.requests: list[Request] = []
        self._failures: list[tuple[str, str, int]] = []
        self._lock = Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"  # large files come from another host, as on the real Hub

    def __enter__(self) -> HubServer:
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    # -- for tests ---------------------------------------------------------------------------------------------------

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment for a client process: this server, a cache of its own, no other Hub settings."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | own | {"no_proxy": own["NO_PROXY"]} | quiet | ({"HF_TOKEN": token} if token else {})

    def fail(self, method: str, fragment: str, status: int = 500, times: int = 1) -> None:
        """Answer the next `times` requests whose path contains `fragment` with an error instead of serving them."""
        self._failures += [(method, fragment, status)] * times

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch without the one every repository starts with."""
        newest = self.repos[repo_id].branches[revision][-1].files
        return {name: data for name, data in newest.items() if name not in FIRST_COMMIT}

    def writes(self) -> list[Request]:
        """Return the requests that create or change something."""
        return [request for request in self.requests if request.method not in ("GET", "HEAD")]

    def count(self, method: str, fragment: str) -> int:
        """Return how many requests had this method and this in their path."""
        return sum(request.method == method and fragment in request.path for request in self.requests)

    # -- one request -------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Serve one request and note it down."""
        user = None
        with self._lock:
            try:
                user = self._user(headers.get("Authorization"))
                answer = self._route(method, target, user, body)
            except RefusalError as refusal:
                answer = refusal.answer
            self.requests.append(Request(method, target, answer.status, user, body))
        return answer

    def _user(self, authorization: str | None) -> str | None:
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return user

    def _route(self, method: str, target: str, user: str | None, body: bytes) -> Answer:
        for failure in self._failures:
            if failure[0] == method and failure[1] in target:
                self._failures.remove(failure)
                raise RefusalError(failure[2], "Injected failure")
        url = urlsplit(target)
        for verb, pattern, serve in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method in verb.split():
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return serve(self, user, body, query=parse_qs(url.query), **parts)
        raise RefusalError(404, f"No such endpoint: {method} {url.path}")

    def _repo(self, name: str, user: str | None, *, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        owner = name.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise RefusalError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise RefusalError(401 if user is None else 403, f"You have no write access to {name}")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        if revision in repo.branches:
            return repo.branches[revision][-1]
        for commit in (commit for commits in repo.branches.values() for commit in commits):
            if commit.oid == revision:
                return commit
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # -- account, repositories, cards --------------------------------------------------------------------------------

    def whoami(self, user: str | None, body: bytes, query: Any) -> Answer:
        """GET /api/whoami-v2."""
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        return _json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, user: str | None, body: bytes, query: Any) -> Answer:
        """POST /api/repos/create; 0.x says `private`, 2.x says `visibility`."""
        wish = json.loads(body)
        owner = wish.get("organization") or user
        if user is None or owner != user:
            raise RefusalError(401 if user is None else 403, f"You have no write access to {owner}")
        name = f"{owner}/{wish['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repos:
            return _json({"error": "You already created this model repo"} | url, 409)
        private = bool(wish.get("private")) or wish.get("visibility") == "private"
        self.repos[name] = Repo(name, private, {"main": [_new_commit(FIRST_COMMIT, "initial commit", "")]})
        return _json(url)

    def create_branch(self, user: str | None, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/branch/{branch}."""
        found = self._repo(repo, user, write=True)
        if revision in found.branches:
            raise RefusalError(409, "Reference already exists")
        start = self._commit(found, json.loads(body or b"{}").get("startingPoint", "main"))
        found.branches[revision] = [start]
        return _json({})

    def validate_yaml(self, user: str | None, body: bytes, query: Any) -> Answer:
        """POST /api/validate-yaml."""
        errors, warnings = card_faults(json.loads(body)["content"])
        messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return _json(messages, 400 if errors else 200)

    # -- upload ------------------------------------------------------------------------------------------------------

    def preupload(self, user: str | None, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/preupload/{revision}: which file goes where."""
        self._commit(self._repo(repo, user, write=True), revision)
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular"}
            for f in json.loads(body)["files"]
        ]
        return _json({"files": [f | {"shouldIgnore": False} for f in files]})

    def lfs_batch(self, user: str | None, body: bytes, query: Any, repo: str) -> Answer:
        """POST /{repo}.git/info/lfs/objects/batch: where to put each large file."""
        self._repo(repo, user, write=True)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.blobs:
                verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"}
                item["actions"] = {"upload": {"href": f"{self.cdn}/lfs/{item['oid']}"}, "verify": verify}
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, user: str | None, body: bytes, query: Any, oid: str) -> Answer:
        """PUT /lfs/{oid}."""
        if sha256(body).hexdigest() != oid:
            raise RefusalError(400, "The content does not match its SHA-256")
        self.blobs[oid] = body
        return Answer()

    def lfs_get(self, user: str | None, body: bytes, query: Any, oid: str) -> Answer:
        """GET /lfs/{oid}."""
        return Answer(200, self.blobs[oid], {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"})

    def lfs_verify(self, user: str | None, body: bytes, query: Any, repo: str) -> Answer:
        """POST /{repo}.git/info/lfs/objects/verify."""
        wish = json.loads(body)
        if len(self.blobs.get(wish["oid"], b"")) != wish["size"]:
            raise RefusalError(404, "The large file did not arrive")
        return _json({})

    def commit(self, user: str | None, body: bytes, query: Any, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/commit/{revision}: NDJSON, applied as a whole or not at all."""
        found = self._repo(repo, user, write=True)
        parent = self._commit(found, revision)
        lines = [json.loads(line) for line in body.splitlines() if line]
        files, header = dict(parent.files), lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        commit = _new_commit(files, header["summary"], parent.oid)
        found.branches[revision].append(commit)
        url = f"{self.endpoint}/{repo}/commit/{commit.oid}"
        return _json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, bytes], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.blobs:
                raise RefusalError(400, f"The large file {path} was not uploaded")
            files[path] = self.blobs[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path))]
            if not gone:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusalError(400, f"Unknown operation: {key}")

    # -- download ----------------------------------------------------------------------------------------------------

    def info(self, user: str | None, body: bytes, query: Any, repo: str, revision: str = "main") -> Answer:
        """GET /api/models/{repo}[/revision/{revision}]."""
        found = self._repo(repo, user)
        commit = self._commit(found, revision)
        card = _front_matter(commit.files.get("README.md", b"").decode()) or {}
        told = {"id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "tags": card.get("tags", [])}
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        return _json(told | {"siblings": siblings, "cardData": card, "pipeline_tag": card.get("pipeline_tag")})

    def tree(self, user: str | None, body: bytes, query: Any, repo: str, revision: str, path: str = "") -> Answer:
        """GET /api/models/{repo}/tree/{revision}[/{path}]."""
        files = self._commit(self._repo(repo, user), revision).files
        prefix = f"{path}/" if path else ""
        inside = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise RefusalError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        flat = {name: data for name, data in inside.items() if deep or "/" not in name.removeprefix(prefix)}
        folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside if name not in flat}
        told = [{"type": "directory", "path": name, "oid": _git_oid(name.encode()), "size": 0} for name in folders]
        return _json(told + [_tree_entry(name, data) for name, data in flat.items()])

    def resolve(self, user: str | None, body: bytes, query: Any, repo: str, revision: str, path: str) -> Answer:
        """GET and HEAD /{repo}/resolve/{revision}/{path}; large files redirect to the other host."""
        commit = self._commit(self._repo(repo, user), revision)
        if path not in commit.files:
            refusal = RefusalError(404, "Entry not found", "EntryNotFound")
            refusal.answer.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not path.endswith(LFS_SUFFIXES):
            return Answer(200, data, headers | {"ETag": f'"{_git_oid(data)}"'})
        oid = sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"', "Location": f"{self.cdn}/lfs/{oid}"}
        return Answer(302, b"", headers | linked)


Serve = Callable[..., Answer]
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_AT = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Serve]] = [
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/repos/create", HubServer.create),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("POST", f"/api/models/{_REPO}/branch/{_AT}", HubServer.create_branch),
    ("POST", f"/api/models/{_REPO}/preupload/{_AT}", HubServer.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_AT}", HubServer.commit),
    ("GET", f"/api/models/{_REPO}/tree/{_AT}(/(?P<path>.+))?", HubServer.tree),
    ("GET", f"/api/models/{_REPO}(/revision/{_AT})?", HubServer.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", HubServer.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_get),
    ("GET HEAD", f"/{_REPO}/resolve/{_AT}/(?P<path>.+)", HubServer.resolve),
]


def card_faults(content: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings of a card's metadata, the checks of the Hub that our cards could fail."""
    data = _front_matter(content)
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"], []
    named = [*_listed(data.get("base_model")), *_listed(data.get("datasets"))]
    errors = [f"not a valid repository name: {name!r}" for name in named if not REPO_NAME.fullmatch(str(name))]
    for key in ("tags", "metrics", "datasets"):
        if key in data and not all(isinstance(item, str) for item in _listed(data[key])):
            errors.append(f'"{key}" must be strings')
    errors += [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag") if _odd(data, key)]
    return errors + _index_faults(data.get("model-index", [])), []


def _index_faults(index: list[dict[str, Any]]) -> list[str]:
    faults = []
    for where, model in enumerate(index):
        faults += [] if isinstance(model.get("name"), str) else [f'"model-index[{where}].name" is required']
        for result in model.get("results", []):
            wanted = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
            faults += [f'"{a}.{b}" is required' for a, b in wanted if not result.get(a, {}).get(b)]
            values = [metric.get("value") for metric in result.get("metrics", [])]
            faults += [] if values and None not in values else ['"metrics[].value" is required']
    return faults


def _odd(data: Mapping[str, Any], key: str) -> bool:
    return key in data and not isinstance(data[key], str)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _front_matter(content: str) -> Any:
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def _new_commit(files: Mapping[str, bytes], message: str, parent: str) -> Commit:
    listing = "".join(f"{name} {_git_oid(data)}\n" for name, data in sorted(files.items()))
    return Commit(dict(files), message, sha1(f"{parent}\n{message}\n{listing}".encode()).hexdigest())


def _git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
    large = {"lfs": {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
    return entry | large if name.endswith(LFS_SUFFIXES) else entry


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # both clients keep connections open

        def _serve(self) -> None:
            answer = hub.answer(self.command, self.path, self.headers, self._body())
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *_: object) -> None:
            """Stay silent: tests read `requests`."""

    for verb in ("GET", "HEAD", "POST", "PUT"):
        setattr(Handler, f"do_{verb}", Handler._serve)
    return Handler

"""A small Hub for tests: the HTTP protocol that the real `huggingface_hub` client speaks, both generations of it.

Commits live in memory, large files on the disk. Point a client at it by `HF_ENDPOINT` in a process of its own
(`HubServer.environment`), because `huggingface_hub` reads its environment when it is imported.

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
from http.server import ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_cards import card_faults, front_matter
from hub_http import Answer, Call, Failure, RefusalError, Request, handler, json_answer
from hub_storage import Blob, Blobs, Commit, Content, Repo, content, git_oid, new_commit, size_of

LFS_SUFFIXES = (
    ".safetensors",
    ".onnx",
    ".onnx_data",
    ".bin",
    ".pt",
    ".png",
)  # what the Hub's .gitattributes sends there
FIRST_COMMIT = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class HubServer:
    """The server and what it stores; use it as a context manager.

    Args:
        users: Token to user name; a user may write under the own name only.
        chunk_size: Bytes; larger files go up in parts of this size. ``None``: each in one piece.
    """

    def __init__(self, users: Mapping[str, str] | None = None, *, chunk_size: int | None = None) -> None:
        self.users = dict(users or {"hf_TestTokenTestTokenTestToken": "tester"})
        self.token = next(iter(self.users))
        self.repos: dict[str, Repo] = {}
        self._disk = TemporaryDirectory()
        self.folder = Path(self._disk.name)
        self.blobs = Blobs(self.folder)
        self.chunk_size = chunk_size
        self.overtaking: dict[str, bytes] = {}  # files that somebody else commits just before the next commit
        self.requests: list[Request] = []
        self._failures: list[Failure] = []
        self._lock = Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}"  # large files come from another host, as on the real Hub

    def __enter__(self) -> HubServer:
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._disk.cleanup()

    # -- for tests ---------------------------------------------------------------------------------------------------

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment for a client process: this server, a cache of its own, no other Hub settings."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | own | {"no_proxy": own["NO_PROXY"]} | quiet | ({"HF_TOKEN": token} if token else {})

    def fail(
        self, method: str, fragment: str, status: int = 500, times: int = 1, *, how: str = "answer", **headers: str
    ) -> None:
        """Let the next `times` requests whose path contains `fragment` fail.

        Args:
            method: Of the requests.
            fragment: In their path.
            status: Of the error answer.
            times: How many of them.
            how: ``"answer"`` gives the status; ``"break"`` cuts the connection in the middle of the request's body, or
                of the answer's where the request has none; ``"lose"`` does what was asked and cuts the connection
                before the answer; ``"spoil"`` answers with as many zero bytes.
            headers: Of the error answer, with underscores: ``Retry_After="1"``.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self._failures += [Failure(method, fragment, status, how, named)] * times

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch without the one every repository starts with."""
        newest = self.repos[repo_id].branches[revision][-1].files
        return {name: content(data) for name, data in newest.items() if name not in FIRST_COMMIT}

    def writes(self) -> list[Request]:
        """Return the requests that create or change something."""
        return [request for request in self.requests if request.method not in ("GET", "HEAD")]

    def count(self, method: str, fragment: str) -> int:
        """Return how many requests had this method and this in their path."""
        return sum(request.method == method and fragment in request.path for request in self.requests)

    # -- one request -------------------------------------------------------------------------------------------------

    def failure(self, method: str, target: str) -> Failure | None:
        """Return how this request is to fail, and count it."""
        with self._lock:
            for failure in self._failures:
                if failure.method == method and failure.fragment in target:
                    self._failures.remove(failure)
                    return failure
        return None

    def note(self, method: str, target: str, status: int, call: Call | None = None) -> None:
        """Write down that a request came."""
        self.requests.append(Request(method, target, status, call and call.user, call.body if call else b""))

    def answer(self, method: str, target: str, call: Call, failure: Failure | None = None) -> Answer:
        """Serve one request and note it down."""
        with self._lock:
            try:
                if failure is not None and failure.how == "answer":
                    raise RefusalError(failure.status, "Injected failure", headers=failure.headers)
                call.user = self._user(call.headers.get("Authorization"))
                answer = self._route(method, target, call)
            except RefusalError as refusal:
                answer = refusal.answer
            self.note(method, target, answer.status, call)
        return answer

    def _user(self, authorization: str | None) -> str | None:
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return user

    def _route(self, method: str, target: str, call: Call) -> Answer:
        url = urlsplit(target)
        for verb, pattern, serve in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method in verb.split():
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                call.query = parse_qs(url.query)
                return serve(self, call, **parts)
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

    def whoami(self, call: Call) -> Answer:
        """GET /api/whoami-v2."""
        if call.user is None:
            raise RefusalError(401, "Invalid username or password.")
        return json_answer({"type": "user", "name": call.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, call: Call) -> Answer:
        """POST /api/repos/create; 0.x says `private`, 2.x says `visibility`."""
        wish = call.json()
        owner = wish.get("organization") or call.user
        if call.user is None or owner != call.user:
            raise RefusalError(401 if call.user is None else 403, f"You have no write access to {owner}")
        name = f"{owner}/{wish['name']}"
        url = {"url": f"{self.endpoint}/{name}", "name": name}
        if name in self.repos:
            return json_answer({"error": "You already created this model repo"} | url, 409)
        private = bool(wish.get("private")) or wish.get("visibility") == "private"
        self.repos[name] = Repo(name, private, {"main": [new_commit(FIRST_COMMIT, "initial commit", "")]})
        return json_answer(url)

    def create_branch(self, call: Call, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/branch/{branch}."""
        found = self._repo(repo, call.user, write=True)
        if revision in found.branches:
            raise RefusalError(409, "Reference already exists")
        start = self._commit(found, call.json().get("startingPoint", "main"))
        found.branches[revision] = [start]
        return json_answer({})

    def validate_yaml(self, call: Call) -> Answer:
        """POST /api/validate-yaml."""
        errors, warnings = card_faults(call.json()["content"])
        messages = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return json_answer(messages, 400 if errors else 200)

    # -- upload ------------------------------------------------------------------------------------------------------

    def preupload(self, call: Call, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/preupload/{revision}: which file goes where, and what is there under its name."""
        there = self._commit(self._repo(repo, call.user, write=True), revision).files
        files = []
        for path in (file["path"] for file in call.json()["files"]):
            told = {
                "path": path,
                "shouldIgnore": False,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
            }
            old = there.get(path)
            files.append(told if old is None else told | {"oid": old.oid if isinstance(old, Blob) else git_oid(old)})
        return json_answer({"files": files})

    def lfs_batch(self, call: Call, repo: str) -> Answer:
        """POST /{repo}.git/info/lfs/objects/batch: where to put each large file, whole or part by part."""
        self._repo(repo, call.user, write=True)
        wish = call.json()
        in_parts = self.chunk_size is not None and "multipart" in wish["transfers"]
        for item in wish["objects"]:
            if item["oid"] not in self.blobs.whole:
                verify = {"href": f"{self.endpoint}/{repo}.git/info/lfs/objects/verify"}
                upload = {"href": f"{self.cdn}/lfs/{item['oid']}"}
                if in_parts and item["size"] > self.chunk_size:
                    upload = self._parts(repo, item["oid"], item["size"])
                item["actions"] = {"upload": upload, "verify": verify}
        return json_answer({"transfer": "multipart" if in_parts else "basic", "objects": wish["objects"]})

    def _parts(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        """Return where the parts go, and where to say that all have gone."""
        count = -(-size // self.chunk_size)
        urls = {f"{number:05}": f"{self.cdn}/lfs/{oid}/{number}" for number in range(1, count + 1)}
        complete = f"{self.endpoint}/{repo}.git/info/lfs/objects/complete/{oid}"
        return {"href": complete, "header": {"chunk_size": str(self.chunk_size), **urls}}

    def lfs_put(self, call: Call, oid: str) -> Answer:
        """PUT /lfs/{oid}."""
        if wrong := self.blobs.put(oid, call.upload):
            raise RefusalError(400, wrong)
        return Answer()

    def lfs_put_part(self, call: Call, oid: str, number: str) -> Answer:
        """PUT /lfs/{oid}/{number}."""
        return Answer(headers={"ETag": self.blobs.put_part(oid, int(number), call.upload)})

    def lfs_complete(self, call: Call, repo: str, oid: str) -> Answer:
        """POST /{repo}.git/info/lfs/objects/complete/{oid}: all parts are there (the address is the permission)."""
        etags = {part["partNumber"]: part["etag"] for part in call.json()["parts"]}
        if wrong := self.blobs.join(oid, etags):
            raise RefusalError(400, wrong)
        return json_answer({"success": True})

    def lfs_get(self, call: Call, oid: str) -> Answer:
        """GET /lfs/{oid}, whole or from some byte on."""
        blob = self.blobs.whole[oid]
        headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        wish = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
        if not wish:
            return Answer(200, b"", headers, blob.path, range(blob.size))
        stretch = range(int(wish[1]), min(int(wish[2] or blob.size) + 1, blob.size))
        headers["Content-Range"] = f"bytes {stretch.start}-{stretch.stop - 1}/{blob.size}"
        return Answer(206, b"", headers, blob.path, stretch)

    def lfs_verify(self, call: Call, repo: str) -> Answer:
        """POST /{repo}.git/info/lfs/objects/verify."""
        wish = call.json()
        blob = self.blobs.whole.get(wish["oid"])
        if blob is None or blob.size != wish["size"]:
            raise RefusalError(404, "The large file did not arrive")
        return json_answer({})

    def commit(self, call: Call, repo: str, revision: str) -> Answer:
        """POST /api/models/{repo}/commit/{revision}: NDJSON, applied as a whole or not at all."""
        found = self._repo(repo, call.user, write=True)
        parent = self._commit(found, revision)
        if self.overtaking:
            parent = new_commit(parent.files | self.overtaking, "Somebody else's", parent.oid)
            found.branches[revision].append(parent)
            self.overtaking = {}
        lines = [json.loads(line) for line in call.body.splitlines() if line]
        files, header = dict(parent.files), lines[0]["value"]
        if header.get("parentCommit", parent.oid) != parent.oid:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        commit = new_commit(files, header["summary"], parent.oid)
        found.branches[revision].append(commit)
        url = f"{self.endpoint}/{repo}/commit/{commit.oid}"
        return json_answer({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _apply(self, files: dict[str, Content], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.blobs.whole:
                raise RefusalError(400, f"The large file {path} was not uploaded")
            files[path] = self.blobs.whole[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(path))]
            if not gone:
                raise RefusalError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise RefusalError(400, f"Unknown operation: {key}")

    # -- download ----------------------------------------------------------------------------------------------------

    def info(self, call: Call, repo: str, revision: str = "main") -> Answer:
        """GET /api/models/{repo}[/revision/{revision}]."""
        found = self._repo(repo, call.user)
        commit = self._commit(found, revision)
        card = front_matter(content(commit.files.get("README.md", b"")).decode()) or {}
        told = {"id": repo, "modelId": repo, "sha": commit.oid, "private": found.private, "tags": card.get("tags", [])}
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        return json_answer(told | {"siblings": siblings, "cardData": card, "pipeline_tag": card.get("pipeline_tag")})

    def tree(self, call: Call, repo: str, revision: str, path: str = "") -> Answer:
        """GET /api/models/{repo}/tree/{revision}[/{path}]."""
        files = self._commit(self._repo(repo, call.user), revision).files
        prefix = f"{path}/" if path else ""
        inside = {name: data for name, data in sorted(files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise RefusalError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = call.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        flat = {name: data for name, data in inside.items() if deep or "/" not in name.removeprefix(prefix)}
        folders = {prefix + name.removeprefix(prefix).split("/")[0] for name in inside if name not in flat}
        told = [{"type": "directory", "path": name, "oid": git_oid(name.encode()), "size": 0} for name in folders]
        return json_answer(told + [_tree_entry(name, data) for name, data in flat.items()])

    def resolve(self, call: Call, repo: str, revision: str, path: str) -> Answer:
        """GET and HEAD /{repo}/resolve/{revision}/{path}; large files redirect to the other host."""
        commit = self._commit(self._repo(repo, call.user), revision)
        if path not in commit.files:
            refusal = RefusalError(404, "Entry not found", "EntryNotFound")
            refusal.answer.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if not isinstance(data, Blob):
            return Answer(200, data, headers | {"ETag": f'"{git_oid(data)}"'})
        linked = {"X-Linked-Size": str(data.size), "X-Linked-Etag": f'"{data.oid}"'}
        linked["Location"] = f"{self.cdn}/lfs/{data.oid}"
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
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/complete/(?P<oid>[0-9a-f]{{64}})", HubServer.lfs_complete),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", HubServer.lfs_put_part),
    ("GET", "/lfs/(?P<oid>[0-9a-f]{64})", HubServer.lfs_get),
    ("GET HEAD", f"/{_REPO}/resolve/{_AT}/(?P<path>.+)", HubServer.resolve),
]


def _tree_entry(name: str, data: Content) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": size_of(data), "oid": git_oid(data)}
    large = isinstance(data, Blob)
    return entry | ({"lfs": {"oid": data.oid, "size": data.size, "pointerSize": 134}} if large else {})

"""What the small Hub stores: commits in memory, large files on the disk, uploads whole or in parts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1, sha256
from pathlib import Path

PIECE = 1 << 20  # bytes that are in memory at a time


@dataclass(frozen=True)
class Blob:
    """A large file on the disk."""

    path: Path
    oid: str
    size: int


Content = bytes | Blob


@dataclass
class Commit:
    """One commit: all files of the repository after it."""

    files: dict[str, Content]
    message: str
    oid: str


@dataclass
class Repo:
    """A model repository: its branches, each a list of commits, oldest first."""

    name: str
    private: bool
    branches: dict[str, list[Commit]]


class Blobs:
    """Large files by SHA-256, and the parts of those that are under way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: dict[str, Blob] = {}
        self.parts: dict[tuple[str, int], Path] = {}

    def put(self, oid: str, body: Path) -> str | None:
        """Take a whole file; return what is wrong with it."""
        blob = Blob(self.folder / oid, digest(body), body.stat().st_size)
        if blob.oid != oid:
            return "The content does not match its SHA-256"
        body.rename(blob.path)
        self.whole[oid] = blob
        return None

    def put_part(self, oid: str, number: int, body: Path) -> str:
        """Take one part, in place of an earlier try; return its etag."""
        self.parts[oid, number] = body.rename(self.folder / f"{oid}.{number}")
        return f'"{digest(self.parts[oid, number])}"'

    def join(self, oid: str, etags: Mapping[int, str]) -> str | None:
        """Make one file of its parts; return what is wrong with them."""
        joined = self.folder / f"{oid}.joined"
        with joined.open("wb") as whole:
            for number, etag in sorted(etags.items()):
                part = self.parts.pop((oid, number), None)
                if part is None or etag.strip('"') != digest(part):
                    return f"Part {number} did not arrive"
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, PIECE)
                part.unlink()
        return self.put(oid, joined)


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    found = sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            found.update(piece)
    return found.hexdigest()


def content(data: Content) -> bytes:
    """Return the bytes of a stored file."""
    return data if isinstance(data, bytes) else data.path.read_bytes()


def size_of(data: Content) -> int:
    """Return how many bytes a stored file has."""
    return len(data) if isinstance(data, bytes) else data.size


def git_oid(data: Content) -> str:
    """Return git's name of a content; for a large file of the pointer that git holds in its place."""
    if isinstance(data, Blob):
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{data.oid}\nsize {data.size}\n".encode()
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def new_commit(files: Mapping[str, Content], message: str, parent: str) -> Commit:
    """Return a commit whose name follows from what is in it."""
    listing = "".join(f"{name} {git_oid(data)}\n" for name, data in sorted(files.items()))
    return Commit(dict(files), message, sha1(f"{parent}\n{message}\n{listing}".encode()).hexdigest())

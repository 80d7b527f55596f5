"""A small server that speaks as much of the Hugging Face hub's protocol as huggingface_hub asks of it here."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_secret_of_the_tests"  # the one that opens gated repositories and may write
WEIGHTS = ".safetensors"  # kept as large files


@dataclass
class Repository:
    """Its commits, each a mapping of paths to contents, and the branches that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a new commit on a branch; returns its hash."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        digest = hashlib.sha1(repr(sorted(whole.items())).encode() + branch.encode()).hexdigest()
        self.commits[digest], self.branches[branch] = whole, digest
        return digest


class Hub:
    """Repositories by kind and name, what was asked for, and files whose transfer breaks off."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.address = ""

    def add(self, name: str, folder: Path, *, gated: bool = False) -> str:
        """A repository, `models/org/name` or `datasets/org/name`, with a folder's files; returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        found = self.repositories.setdefault(name, Repository(gated=gated))
        return found.commit(files)


def blob(content: bytes) -> str:
    """git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        """Nothing is printed."""

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        """Send JSON or bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        """Send an error of the hub's."""
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def repository(self, name: str, revision: str | None = None) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; None after an error was sent."""
        found = self.hub.repositories.get(name)
        wanted = revision or "main"
        commit = found.branches.get(wanted, wanted) if found else ""
        if found is None:
            self.refuse(404, "RepoNotFound")
        elif found.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403, "GatedRepo")
        elif commit in found.commits:
            return found, commit
        else:
            self.refuse(404, "RevisionNotFound")
        return None

    def do_HEAD(self) -> None:
        """The head of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """What a repository is and holds, and its files."""
        path = unquote(urlparse(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        if match := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)(?:/revision/(.+))?", path):
            if found := self.repository(match[1], match[2]):
                files = [{"rfilename": name} for name in found[0].commits[found[1]]]
                self.answer(200, {"id": match[1].split("/", 1)[1], "sha": found[1], "siblings": files})
        elif match := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)/tree/([^/]+)", path):
            if found := self.repository(match[1], match[2]):
                self.answer(200, [self.entry(*item) for item in found[0].commits[found[1]].items()])
        elif match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.repository(f"{'datasets' if match[1] else 'models'}/{match[2]}", match[3]):
                self.file(found, match[4])
        else:
            self.refuse(404, "EntryNotFound")

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        """A file in a listing."""
        found = {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return {**found, "lfs": large} if name.endswith(WEIGHTS) else found

    def file(self, found: tuple[Repository, str], name: str) -> None:
        """The content of a file, or half of it."""
        content = found[0].commits[found[1]].get(name)
        if content is None:
            self.refuse(404, "EntryNotFound")
            return
        tag = hashlib.sha256(content).hexdigest() if name.endswith(WEIGHTS) else blob(content)
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{tag}"', "X-Linked-Size": str(len(content))}
        start = int(re.match(r"bytes=(\d+)", self.headers.get("Range", "bytes=0"))[1])
        if self.command == "HEAD" or name not in self.hub.broken:
            self.answer(206 if start else 200, content[start:], **headers)
            return
        self.send_response(200)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def do_POST(self) -> None:
        """What an upload asks for."""
        path = unquote(urlparse(self.path).path).strip("/")
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and path != "api/validate-yaml":
            self.refuse(401, "Unauthorized")
            return
        if path == "api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "api/repos/create":
            said = json.loads(body)
            name = f"models/{said['organization']}/{said['name']}"
            new = name not in self.hub.repositories
            self.hub.repositories.setdefault(name, Repository()).branches.setdefault(
                "main", self.hub.repositories[name].commit({".gitattributes": b""})
            )
            self.answer(200 if new else 409, {"url": f"{self.hub.address}/{name}"})
        elif match := re.fullmatch(r"api/(models/[^/]+/[^/]+)/branch/(.+)", path):
            repository = self.hub.repositories[match[1]]
            repository.branches.setdefault(match[2], repository.branches["main"])
            self.answer(200, {})
        elif match := re.fullmatch(r"api/(models/[^/]+/[^/]+)/preupload/(.+)", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "lfs" if n.endswith(WEIGHTS) else "regular", "shouldIgnore": False}
                     for n in names]  # fmt: skip
            self.answer(200, {"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            there = [{**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}} for one in wanted]
            self.answer(200, {"transfer": "basic", "objects": there})
        elif match := re.fullmatch(r"api/(models/[^/]+/[^/]+)/commit/(.+)", path):
            self.commit(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.refuse(404, "EntryNotFound")

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """Files of a commit."""
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        digest = self.hub.repositories[name].commit(files, branch)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{digest}", "commitOid": digest})

    def do_PUT(self) -> None:
        """The content of a large file."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

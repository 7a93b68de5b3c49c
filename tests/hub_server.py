"""A local HTTP server with those endpoints of the Hugging Face hub that its client uses in the tests.

Repositories are in memory. Files of at least :data:`LFS_BYTES` are served as the hub serves large files: a redirect to
another host, with ranges. Faults are attributes of :class:`HubServer`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS_BYTES = 4096
NEVER_LARGE = (".json", ".md", ".gitattributes")
TOKEN = "hf_of_a_test"

Tree = Mapping[str, bytes]
"""The files of one commit by their path."""


def git_hash(content: bytes) -> str:
    """The id that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str, size: int) -> bool:
    """Whether a file is stored as a large one, by git LFS."""
    return size >= LFS_BYTES and not name.endswith(NEVER_LARGE)


@dataclass
class Repository:
    """A repository: its branches, and the files of each commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Tree] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Tree, branch: str = "main", message: str = "first") -> str:
        """Makes a commit with exactly these files; returns its id."""
        listed = f"{len(self.commits)} {sorted((name, git_hash(content)) for name, content in files.items())}"
        commit = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        self.messages.append(message)
        return commit

    def files(self, revision: str = "main") -> Tree:
        """The files of a branch or a commit."""
        return self.commits[self.refs.get(revision, revision)]


class HubServer:
    """The state of the server.

    Attributes:
        repositories: The repositories by name.
        requests: Method and path of each request.
        ranges: The ``Range`` of each download of a large file; empty for a whole one.
        cut_after: Bytes after which the next download of a large file ends in the middle; then all end at once, until
            it is set again. None for no cut.
        status: Status of every answer, in place of the answer; 0 for none.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.cut_after: int | None = None
        self.status = 0
        self.uploaded: dict[str, bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        port = self._http.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    def add(self, name: str, files: Tree | Path, *, private: bool = False, gated: bool = False) -> Repository:
        """Adds a repository with one commit: of files, or of a directory."""
        if isinstance(files, Path):
            found = (path for path in sorted(files.rglob("*")) if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        self.repositories[name] = made = Repository(private, gated)
        made.commit(files)
        return made

    def blob(self, oid: str) -> bytes | None:
        """The content with a SHA-256: of an upload, or of a file of a repository."""
        trees = (tree for one in self.repositories.values() for tree in one.commits.values())
        known = (content for tree in trees for content in tree.values())
        return self.uploaded.get(oid) or next((one for one in known if hashlib.sha256(one).hexdigest() == oid), None)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Answers requests in a thread until the block ends."""
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def plug_in(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path, token: str = "") -> None:
    """Makes the hub's client of this process use a server and an empty cache."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }
    paths = {"HF_HUB_CACHE": str(cache), "HF_TOKEN_PATH": str(cache / "token")}
    flags = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_PROGRESS_BARS": True}
    sizes = {"DOWNLOAD_CHUNK_SIZE": 256}  # bytes: what the client has read of a chunk that is cut off is lost
    for name, value in {**values, **paths, **flags, **sizes}.items():
        monkeypatch.setattr(constants, name, value)
    for module in (file_download, _http):  # they wait between two attempts
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)


class _RefusedError(Exception):
    """An answer with an error, as the hub gives it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = self._chunks() if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.status:
                raise _RefusedError(self.hub.status)
            for pattern, answer in _ROUTES.items():
                if found := re.fullmatch(f"(?:{pattern})", f"{self.command} {path}"):
                    answer(self, *(group and unquote(group) for group in found.groups()))
                    return
            raise _RefusedError(404)
        except _RefusedError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, {"error": error.message}, {key: text for key, text in headers.items() if text})

    def _chunks(self) -> bytes:
        """The body of a request in chunks."""
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any, headers: Mapping[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _repository(self, name: str, *, write: bool = False) -> Repository:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not known):
            raise _RefusedError(404 if known else 401, "RepoNotFound", "Repository not found")
        if found.gated and not write:
            raise _RefusedError(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted")
        if write and not known:
            raise _RefusedError(403, "", "You have no rights to push here")
        return found

    def _tree(self, repository: Repository, revision: str) -> tuple[str, Tree]:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _RefusedError(404, "RevisionNotFound", "Invalid rev id")
        return commit, repository.commits[commit]

    def resolve(self, name: str, revision: str, file: str) -> None:
        """A file, or the redirect to a large one."""
        commit, files = self._tree(self._repository(name), revision)
        headers = {"X-Repo-Commit": commit}
        if file not in files:
            self._send(404, {}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        content = files[file]
        if not is_large(file, len(content)):
            self._send(200, content, {**headers, "ETag": f'"{git_hash(content)}"'})
            return
        oid = hashlib.sha256(content).hexdigest()
        headers |= {
            "X-Linked-ETag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.cdn}/cdn/{oid}",
        }
        self._send(302, b"", headers)

    def download(self, oid: str) -> None:
        """A large file, or the rest of it."""
        content, asked = self.hub.blob(oid), self.headers.get("Range", "")
        if self.headers.get("Authorization"):  # the token is for the hub alone
            raise _RefusedError(400)
        if content is None:
            raise _RefusedError(404)
        if self.command == "GET":
            self.hub.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if start >= len(content):
            raise _RefusedError(416)
        rest, cut = content[start:], self.hub.cut_after
        headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if cut is None or self.command == "HEAD":
            self._send(206 if asked else 200, rest, headers)
            return
        self._send(206 if asked else 200, rest[:cut], {**headers, "Content-Length": str(len(rest))})
        self.hub.cut_after, self.close_connection = 0, True

    def info(self, name: str, revision: str | None = None) -> None:
        """What the hub knows about a model."""
        repository = self._repository(name)
        commit, files = self._tree(repository, revision or "main")
        card = files.get("README.md", b"").decode()
        found = re.search(r"^license: \"?([\w.-]+)", card, re.MULTILINE)
        siblings = [{"rfilename": file} for file in files]
        values = {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        self._send(200, values | {"cardData": {"license": found[1]} if found else {}})

    def tree(self, name: str, revision: str) -> None:
        """The files of a revision."""
        _, files = self._tree(self._repository(name), revision)
        rows = []
        for file, content in files.items():
            row: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
            if is_large(file, len(content)):
                oid = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            rows.append(row)
        self._send(200, rows)

    def create(self) -> None:
        """Makes a repository."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "", "Invalid username or password.")
        values = json.loads(self.body)
        name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            self._send(HTTPStatus.CONFLICT, url)
            return
        private = bool(values.get("private")) or values.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.onnx filter=lfs\n"}, private=private)
        self._send(200, url)

    def branch(self, name: str, branch: str) -> None:
        """Makes a branch."""
        repository = self._repository(name, write=True)
        if branch in repository.refs:
            raise _RefusedError(409)
        repository.refs[branch] = repository.refs["main"]
        self._send(200, {})

    def validate(self) -> None:
        """Checks that a model card begins with metadata."""
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if found else [{"message": "no metadata"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        """How each file is to be uploaded."""
        _, files = self._tree(self._repository(name, write=True), revision)
        rows = []
        for one in json.loads(self.body)["files"]:
            large, content = is_large(one["path"], one["size"]), files.get(one["path"])
            known = None if content is None else hashlib.sha256(content).hexdigest() if large else git_hash(content)
            mode = "lfs" if large else "regular"
            rows.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._send(200, {"files": rows})

    def batch(self, name: str) -> None:
        """Where large files are to be uploaded; a file that the server has needs no upload."""
        self._repository(name, write=True)
        rows = []
        for one in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}
            rows.append({**one} if self.hub.blob(one["oid"]) is not None else {**one, "actions": upload})
        self._send(200, {"transfer": "basic", "objects": rows})

    def upload(self, oid: str) -> None:
        """A large file."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, "", "the SHA-256 differs")
        self.hub.uploaded[oid] = self.body
        self._send(200, b"")

    def commit(self, name: str, revision: str) -> None:
        """Makes a commit of uploaded files."""
        repository = self._repository(name, write=True)
        files, message = dict(self._tree(repository, revision)[1]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                content = self.hub.blob(value["oid"])
                if content is None:
                    raise _RefusedError(400, "", "the file was not uploaded")
                files[value["path"]] = content
        made = repository.commit(files, revision, message)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made}", "commitOid": made})


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Any] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate,
    f"GET /api/models/{_NAME}": _Handler.info,
    f"GET /api/models/{_NAME}/revision/(.+)": _Handler.info,
    f"GET /api/models/{_NAME}/tree/(.+)": _Handler.tree,
    f"POST /api/models/{_NAME}/branch/(.+)": _Handler.branch,
    f"POST /api/models/{_NAME}/preupload/(.+)": _Handler.preupload,
    f"POST /api/models/{_NAME}/commit/(.+)": _Handler.commit,
    rf"POST /{_NAME}\.git/info/lfs/objects/batch": _Handler.batch,
    "PUT /upload/([0-9a-f]{64})": _Handler.upload,
    "(?:GET|HEAD) /cdn/([0-9a-f]{64})": _Handler.download,
    f"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)": _Handler.resolve,
}

"""A stand-in of the Hugging Face hub on this machine: the HTTP interface that huggingface_hub uses, in memory.

Repositories of models with branches and commits, and of data sets to read; files go up as text in a commit (regular),
or by Git LFS first; tokens name their user, and whether they may write.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_me": ("me", True), "hf_reader": ("me", False), "hf_other": ("other", True)}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # hash -> files
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)  # paths

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(files)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    endpoint: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by SHA-256
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)  # file, first byte, end
    upload_mode: str = "regular"  # that preupload answers for safetensors
    fails_with: int | None = None  # status of every answer

    def create(self, repo: str, files: dict[str, bytes], **settings: Any) -> Repository:
        made = self.repos[repo] = Repository(**settings)
        made.commit("main", files, "initial commit")
        return made

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.branches[branch]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.writes = TOKENS.get(token, (None, False))
        if self.hub.fails_with:
            return self._send(self.hub.fails_with, {"error": "out of order"})
        if token and self.user is None:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, answer in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                return answer(self, **{key: unquote(value) for key, value in found.groupdict().items() if value})
        return self._send(404, {"error": f"no such page: {self.command} {path}"})

    def _send(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _readable(self, repo: str) -> Repository | None:
        """The repository, or None after an answer that it is not there for this user."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.user != repo.split("/", maxsplit=1)[0]):
            status = 404 if self.user else 401  # the hub does not say which repositories are private
            self._send(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if found.gated and self.user != repo.split("/", maxsplit=1)[0]:
            self._send(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
            return None
        return found

    def _writable(self, repo: str) -> Repository | None:
        found = self._readable(repo)
        if found is not None and not (self.writes and self.user == repo.split("/", maxsplit=1)[0]):
            self._send(403, {"error": "You don't have the required permissions to perform this action"})
            return None
        return found

    def _commit_of(self, found: Repository, revision: str) -> str | None:
        sha = found.resolve(revision)
        if sha is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return sha

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.user
        repo = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if self.user is None:
            return self._send(401, {"error": "Invalid username or password."})
        if not self.writes or owner != self.user:
            return self._send(403, {"error": f"You don't have the rights to create a model under {owner}"})
        if repo in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", **url})
        private = asked.get("visibility") == "private" or asked.get("private", False)  # now, and before 2.0
        self.hub.create(repo, {".gitattributes": b""}, private=private)
        return self._send(200, url)

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        try:
            head = yaml.safe_load(text.split("---\n")[1])
            assert isinstance(head, dict)
            wrong = [key for key in ("license", "library_name") if not isinstance(head.get(key, ""), str)]
            for model in head.get("model-index", []):
                for result in model["results"]:
                    assert {"type"} <= set(result["task"])
                    assert {"name", "type"} <= set(result["dataset"])
                    assert all({"type", "value"} <= set(metric) for metric in result["metrics"])
        except (yaml.YAMLError, AssertionError, IndexError, KeyError, TypeError) as error:
            wrong = [repr(error)]
        self._send(400 if wrong else 200, {"errors": [{"message": each} for each in wrong], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self._readable(repo)) and (sha := self._commit_of(found, revision)):
            files = [{"rfilename": name} for name in found.commits[sha]]
            facts = {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": files, "tags": []}
            self._send(200, facts)

    def tree(self, repo: str, revision: str, below: str = "") -> None:
        if (found := self._readable(repo)) and (sha := self._commit_of(found, revision)):
            folder = f"{below}/" if below else ""
            inside = [name for name in found.commits[sha] if name.startswith(folder)]
            recursive = "recursive=true" in self.path.lower()
            listed = [_entry(found, sha, name) for name in inside if recursive or "/" not in name.removeprefix(folder)]
            deeper = {folder + name.removeprefix(folder).split("/")[0] for name in inside if "/" in name[len(folder) :]}
            self._send(200, [*listed, *({"type": "directory", "path": name, "oid": "0"} for name in sorted(deeper))])

    def paths_info(self, repo: str, revision: str) -> None:
        if (found := self._readable(repo)) and (sha := self._commit_of(found, revision)):
            asked = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            self._send(200, [_entry(found, sha, name) for name in asked if name in found.commits[sha]])

    def branch(self, repo: str, revision: str) -> None:
        if found := self._writable(repo):
            if revision in found.branches:
                return self._send(409, {"error": "Reference already exists"})
            found.branches[revision] = found.branches["main"]
            self._send(201, {})
        return None

    def preupload(self, repo: str, revision: str) -> None:
        if (found := self._writable(repo)) and (sha := self._commit_of(found, revision)):
            answer = []
            for asked in json.loads(self.body)["files"]:
                mode = self.hub.upload_mode if asked["path"].endswith(".safetensors") else "regular"
                before = found.commits[sha].get(asked["path"])
                oid = {} if before is None or mode == "lfs" else {"oid": _oid(before)}
                answer.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
            self._send(200, {"files": answer})

    def lfs_batch(self, repo: str) -> None:
        if self._writable(repo):
            objects = []
            for asked in json.loads(self.body)["objects"]:
                actions = {"upload": {"href": f"{self.hub.endpoint}/lfs-objects/{asked['oid']}"}}
                objects.append(asked | ({} if asked["oid"] in self.hub.objects else {"actions": actions}))
            self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "another content"})
        self.hub.objects[oid] = self.body
        return self._send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if (found := self._writable(repo)) and (sha := self._commit_of(found, revision)):
            files, message = dict(found.commits[sha]), ""
            for line in self.body.splitlines():
                key, value = (json.loads(line)[name] for name in ("key", "value"))
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    found.lfs.discard(value["path"])
                elif key == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                    found.lfs.add(value["path"])
                elif key == "deletedFile":
                    del files[value["path"]]
            new = found.commit(revision, files, message)
            self._send(
                200, {"success": True, "commitOid": new, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{new}"}
            )

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self._readable(repo)) and (sha := self._commit_of(found, revision)):
            content = found.commits[sha].get(name)
            if content is None:
                return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            headers = {"X_Repo_Commit": sha, "ETag": f'"{_oid(content)}"', "Accept_Ranges": "bytes"}
            if name in found.lfs:
                headers["X_Linked_Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["X_Linked_Size"] = str(len(content))
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if asked and self.command == "GET":
                first, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
                self.hub.ranges.append((name, first, end))
                headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                return self._send(206, content[first:end], **headers)
            self._send(200, content, **headers)
        return None


def _entry(repository: Repository, sha: str, name: str) -> dict[str, Any]:
    """What a listing says of a file."""
    content = repository.commits[sha][name]
    entry = {"type": "file", "path": name, "oid": _oid(content), "size": len(content)}
    if name in repository.lfs:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


def _oid(content: bytes) -> str:
    """The hash of a file in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", f"/api/datasets/{REPO}", Handler.info),
    ("GET", f"/api/datasets/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/datasets/{REPO}/tree/(?P<revision>[^/]+)(/(?P<below>.+))?", Handler.tree),
    ("POST", f"/api/datasets/{REPO}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("HEAD GET", f"/datasets/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
    ("POST", f"/api/models/{REPO}/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs-objects/(?P<oid>[0-9a-f]{64})", Handler.lfs_object),
    ("HEAD GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

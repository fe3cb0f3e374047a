"""A Hub of our own on the loopback device: enough of the real one's interface for its real client to push and pull.

Repositories are dictionaries in memory. Uploads are "regular" (never LFS or Xet), so a push is one commit request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_secret_of_the_tests"  # may write
READER = "hf_may_only_read"
REPOSITORY = r"(?P<repo>[^/]+/[^/]+)"


class LoopbackHub:
    """A running server and what it holds; use as a context manager.

    `repos[name]["branches"][branch]` is the list of commit ids, oldest first, `commits[id]` the files of a commit.
    `drop_commits` counts how many of the next commit requests are cut off in the middle.
    """

    def __init__(self, user: str = "org") -> None:
        self.user = user
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.drop_commits = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_commit(self, repo: str, branch: str, files: dict[str, bytes]) -> str:
        history = self.repos[repo]["branches"].setdefault(branch, [])
        digest = hashlib.sha1(f"{repo} {branch} {len(history)} {sorted(files)}".encode()).hexdigest()
        self.commits[digest] = files
        history.append(digest)
        return digest

    def find(self, repo: str, revision: str) -> str | None:
        """The commit a revision names: a branch's newest, or a commit id."""
        branches = self.repos[repo]["branches"]
        if revision in branches:
            return branches[revision][-1]
        return revision if any(revision in history for history in branches.values()) else None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What the newest commit of a branch holds."""
        return self.commits[self.find(repo, revision)]

    def environment(self, home: Path, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """Variables under which the real client talks to this server."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "http_proxy", "HTTP_"))
        }
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **settings, **threads, **({} if token is None else {"HF_TOKEN": token}), **more}


def run_python(code: str, environment: dict[str, str], folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in a fresh process and folder."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)


class Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>.+)", "preupload"),
        ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<revision>.+)", "branch"),
        ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>.+)", "commit"),
        ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
        ("GET", rf"/api/models/{REPOSITORY}(?:/revision/(?P<revision>.+))?", "info"),
        ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            if verb == method and (found := re.fullmatch(pattern, path)):
                asked = {**found.groupdict("")}
                if "revision" in asked:
                    asked["revision"] = asked["revision"] or "main"
                with self.hub.lock:
                    return getattr(self, name)(**asked)
        self.answer(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = handle_request

    # Answers

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        """Whether the request carries the token that may write; answers 401 or 403 if not."""
        if self.token() == TOKEN:
            return True
        self.body()
        status = 403 if self.token() == READER else 401
        self.answer(status, {"error": "You may not write here." if status == 403 else "Invalid username or password."})
        return False

    def commit_of(self, repo: str, revision: str) -> str | None:
        """The commit asked for; answers 404 if repository or revision is not there, or is hidden from the asker."""
        known = self.hub.repos.get(repo)
        if known is None or (known["private"] and self.token() not in (TOKEN, READER)):
            self.refuse("RepoNotFound", 404 if self.token() else 401)
            return None
        found = self.hub.find(repo, revision)
        if found is None:
            self.refuse("RevisionNotFound")
        return found

    # Pages

    def create(self) -> None:
        if not self.may_write():
            return
        wanted = json.loads(self.body())
        repo = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        status = 409 if repo in self.hub.repos else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            self.hub.repos[repo] = {"private": private, "branches": {}}
            self.hub.add_commit(repo, "main", {".gitattributes": b""})
        self.answer(status, {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})

    def validate(self) -> None:
        text = json.loads(self.body())["content"]
        bad = not text.startswith("---\n") or "license: no-such" in text
        errors = [{"message": '"license" must be one of the known'}] if bad else []
        self.answer(400 if bad else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if not self.may_write():
            return
        files = json.loads(self.body())["files"]
        if self.commit_of(repo, revision) is not None:
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer(200, {"files": modes})

    def branch(self, repo: str, revision: str) -> None:
        if not self.may_write():
            return
        self.body()
        if self.commit_of(repo, "main") is None:
            return
        branches = self.hub.repos[repo]["branches"]
        if revision in branches:
            return self.refuse("Reference already exists", 409)
        branches[revision] = list(branches["main"])
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if self.hub.drop_commits:
            self.hub.drop_commits -= 1
            self.rfile.read(100)  # some of the upload, then silence
            self.close_connection = True
            self.connection.close()
            return
        if not self.may_write():
            return
        lines = [json.loads(line) for line in self.body().splitlines()]
        known = self.commit_of(repo, revision)
        if known is None:
            return
        files = dict(self.hub.commits[known])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        made = self.hub.add_commit(repo, revision, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{made}"
        self.answer(200, {"commitUrl": url, "commitOid": made, "success": True})

    def tree(self, repo: str, revision: str, folder: str) -> None:
        found = self.commit_of(repo, revision)
        if found is None:
            return
        prefix = f"{folder}/" if folder else ""
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.hub.commits[found].items()
            if path.startswith(prefix)
        ]
        if prefix and not entries:
            return self.refuse("EntryNotFound")
        self.answer(200, entries)

    def info(self, repo: str, revision: str) -> None:
        found = self.commit_of(repo, revision)
        if found is None:
            return
        siblings = [{"rfilename": path} for path in self.hub.commits[found]]
        private = self.hub.repos[repo]["private"]
        facts = {"id": repo, "modelId": repo, "sha": found, "private": private, "siblings": siblings, "tags": []}
        self.answer(200, {**facts, "downloads": 0, "likes": 0})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.commit_of(repo, revision)
        if found is None:
            return
        content = self.hub.commits[found].get(path)
        if content is None:
            return self.refuse("EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": found, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(206, content[start : end + 1], **headers)

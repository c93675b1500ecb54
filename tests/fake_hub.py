"""A hub on this machine: repositories of one commit that are served from memory, and uploads that are kept."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `repositories` ("models/owner/name" or "datasets/owner/name" to files by path) under any revision; a context manager.

    Attributes:
      asked: method and path of every request; made: what repositories were created with; uploaded: files by repository.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.asked, self.made = repositories, [], []
        self.uploaded: dict[str, dict[str, bytes]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        path = self.path.split("?")[0]
        info = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        tree = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = info or tree or file
        kind = "datasets" if file and file[1] else "models" if file else found and found[1]
        files = self.server.repositories.get(f"{kind}/{found[2]}") if found else None
        if files is None:
            self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif file:
            content = files.get(file[3])
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            head = {"ETag": f'"{hashlib.sha1(content or b"").hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._say(404, b"", missing) if content is None else self._say(200, content, head)
        elif tree:
            under = tree[3].rstrip("/")
            inside = {name: each for name, each in files.items() if name.startswith(under)}
            listed = [
                {"type": "file", "path": name, "size": len(each), "oid": "0" * 40} for name, each in inside.items()
            ]
            folders = {name.rsplit("/", 1)[0] for name in files if "/" in name and not under}
            listed += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
            self._json(listed)
        else:
            siblings = [{"rfilename": name} for name in files]
            said = {
                "id": found[2],
                "sha": COMMIT,
                "siblings": siblings,
                "private": False,
                "disabled": False,
                "tags": [],
            }
            self._json(said | {"downloads": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    do_HEAD = do_GET

    def do_POST(self):
        self.server.asked.append((self.command, self.path))
        body = self._body()
        repository = re.match(r"/api/(models|datasets)/([^/]+/[^/]+)/(preupload|commit)/", self.path)
        if self.path == "/api/repos/create":
            said = json.loads(body)
            self.server.made.append(said | {"token": self.headers.get("Authorization")})
            self._json({"url": f"{self.server.address}/{said.get('organization', 'me')}/{said['name']}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif repository and repository[3] == "preupload":
            files = json.loads(body)["files"]
            said = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            self._json({"files": said})
        elif repository:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                each["value"]["path"]: base64.b64decode(each["value"]["content"])
                for each in lines
                if each["key"] == "file"
            }
            self.server.uploaded[f"{repository[1]}/{repository[2]}"] = files
            self._json({"commitUrl": f"{self.server.address}/{repository[2]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._say(404, b"{}", {})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value):
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status, content, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass

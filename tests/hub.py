"""A stand-in for the Hugging Face hub: what huggingface_hub speaks to make a repo, commit to it (weights by LFS) and
download from it. All that it holds is in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretOfTheTests"
REPO = r"(\w+/[\w.-]+)"


class Handler(BaseHTTPRequestHandler):
    """One request; what the hub holds, and what is to go wrong, is `server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, why, code=""):
        self.reply({"error": why}, status, X_Error_Message=why, X_Error_Code=code)

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub = self.server.hub
        self.hub.asked.append(f"{self.command} {path}")
        for pattern, action in self.ROUTES.items():
            if match := re.fullmatch(pattern, path):
                return action(self, *match.groups())
        return self.refuse(404, f"{self.command} {path} is not spoken here")

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def whoami(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Invalid credentials in Authorization header")
        return self.reply({"name": "me", "type": "user"})

    def create(self):
        wanted = json.loads(self.body())
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = name in self.hub.repos
        if not name.startswith("me/") and not known:
            return self.refuse(403, f"You don't have the rights to create {name}")
        self.hub.repos.setdefault(name, [{}])
        return self.reply({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def validate(self):
        self.body()
        self.reply({"errors": [], "warnings": []})

    def branch(self, name, branch):
        self.body()
        self.reply({})

    def preupload(self, name, revision):
        files = [file["path"] for file in json.loads(self.body())["files"]]
        if not name.startswith("me/"):
            return self.refuse(403, f"Forbidden: you may not write to {name}")
        modes = {True: "lfs", False: "regular"}
        told = {p: {"uploadMode": modes[p.endswith((".safetensors", ".pt"))], "shouldIgnore": p in self.hub.ignored}
                for p in files}  # fmt: skip
        return self.reply({"files": [{"path": path, **how} for path, how in told.items()]})

    def batch(self, name):
        objects = json.loads(self.body())["objects"]
        for part in objects:
            part["actions"] = {"upload": {"href": f"{self.hub.url}/put/{part['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def put(self, oid):
        if self.hub.breaks:
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.shutdown(2)
        self.hub.lfs[oid] = self.body()
        assert hashlib.sha256(self.hub.lfs[oid]).hexdigest() == oid
        return self.reply()

    def commit(self, name, revision):
        files = dict(self.hub.repos[name][-1])
        for line in map(json.loads, self.body().splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.hub.messages.append(value["summary"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                lfs = key == "lfsFile"
                files[value["path"]] = self.hub.lfs[value["oid"]] if lfs else base64.b64decode(value["content"])
        self.hub.repos[name].append(files)
        oid = f"{len(self.hub.repos[name]) - 1:040x}"
        self.reply({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def at(self, name, revision):
        """(commit, its files), or None where there is no such repo."""
        if name not in self.hub.repos:
            return None
        commits = self.hub.repos[name]
        number = int(revision, 16) if revision and len(revision) == 40 else len(commits) - 1  # one line of commits
        return f"{number:040x}", commits[number]

    def tree(self, name, revision):
        if not (found := self.at(name, revision)):
            return self.refuse(404, "Repository not found", "RepoNotFound")
        sizes = [(path, len(content), hashlib.sha1(content).hexdigest()) for path, content in found[1].items()]
        return self.reply([{"type": "file", "path": path, "size": size, "oid": oid} for path, size, oid in sizes])

    def info(self, name, revision=None):
        if not (found := self.at(name, revision)):
            return self.refuse(404, "Repository not found", "RepoNotFound")
        listed = [{"rfilename": path} for path in found[1]]
        return self.reply({"id": name, "sha": found[0], "private": False, "tags": [], "siblings": listed})

    def resolve(self, name, revision, path):
        found = self.at(name, revision)
        if not found or path not in found[1]:
            what = "Entry" if found else "Repo"
            return self.refuse(404, f"{what} not found", f"{what}NotFound")
        content = found[1][path]
        return self.reply(content, X_Repo_Commit=found[0], ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    ROUTES = {  # noqa: RUF012
        "/api/whoami-v2": whoami,
        "/api/repos/create": create,
        "/api/validate-yaml": validate,
        f"/api/models/{REPO}/branch/(.+)": branch,
        f"/api/models/{REPO}/preupload/(.+)": preupload,
        f"/api/models/{REPO}/commit/(.+)": commit,
        f"/api/models/{REPO}/tree/(.+)": tree,
        f"/api/models/{REPO}/revision/(.+)": info,
        f"/api/models/{REPO}": info,
        f"/{REPO}.git/info/lfs/objects/batch": batch,
        "/put/(.+)": put,
        f"/{REPO}/resolve/([^/]+)/(.+)": resolve,
    }


@contextlib.contextmanager
def running():
    """The hub, empty: its url, `repos` (id -> the files of each commit), `messages` of commits, what was `asked`; and
    what is to go wrong: `breaks`, uploads of weights end in the middle; `ignored`, paths that its .gitignore names."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    server.hub = SimpleNamespace(url=url, repos={}, lfs={}, asked=[], messages=[], breaks=False, ignored=())
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()

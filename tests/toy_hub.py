"""A Hugging Face Hub on this computer: as much of its protocol as huggingface_hub asks for to push and pull a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "NeverToBePrinted" * 2


class ToyHub(ThreadingHTTPServer):
    """Repositories of models, in memory.

    ``repos`` holds name → ``private``, ``branches`` (name → commit) and ``commits`` (commit → path → bytes);
    ``stated`` and ``sizes`` override the sha256 and the size that are told of a path (None: none is), and ``asked``
    lists what came in.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.stated, self.sizes, self.asked = {}, {}, {}, {}, []

    def commit(self, repo, files, branch="main"):
        """Put files into a repository, which is made if need be."""
        there = self.repos.setdefault(repo, {"private": False, "branches": {"main": None}, "commits": {}})
        held = there["commits"].get(there["branches"].get(branch), {})
        name = hashlib.sha1(f"{repo}{branch}{len(there['commits'])}".encode()).hexdigest()
        there["commits"][name] = {**held, **files}
        there["branches"][branch] = name
        return name

    def files(self, repo, revision="main"):
        """What a repository holds at a branch or commit; ``None`` where it has no such one."""
        there = self.repos[repo]
        return there["commits"].get(there["branches"].get(revision, revision))

    def told(self, path, content):
        """The sha256 that the hub says a large file has."""
        return self.stated.get(path, hashlib.sha256(content).hexdigest())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing."""

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status, code, said):
        self.answer(status, {"error": said}, X_Error_Code=code, X_Error_Message=said)

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def serve(self):
        hub, path, body = self.server, unquote(urlsplit(self.path).path), self.body()
        hub.asked.append(f"{self.command} {path}")
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not known and not path.startswith("/objects/"):
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in hub.repos
            if not there:
                hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
                hub.repos[name]["private"] = asked.get("visibility") == "private" or asked.get("private", False)
            self.answer(409 if there else 200, {"url": f"{hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            fine = json.loads(body)["content"].startswith("---\n")
            self.answer(200 if fine else 400, {"warnings": [], "errors": [] if fine else [{"message": "no metadata"}]})
        elif found := re.fullmatch(r"/objects/(\w{64})", path):
            hub.objects[found[1]] = body
            self.answer(200 if hashlib.sha256(body).hexdigest() == found[1] else 400)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            wanted = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": wanted})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|preupload|commit)/(.+))?", path):
            self.repository(*found.groups(), body, known)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self.file(*found.groups(), known)
        else:
            self.refuse(404, "", f"no such page: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def missing(self, repo, revision, known):
        """Whether a repository or revision is not to be seen, and was said so."""
        hub = self.server
        if repo not in hub.repos or (hub.repos[repo]["private"] and not known):
            self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif hub.files(repo, revision) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def repository(self, repo, verb, revision, body, known):
        hub, revision = self.server, revision or "main"
        if self.missing(repo, revision, known):
            return
        if verb == "preupload":
            files = [one["path"] for one in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            self.answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            large = {one["value"]["path"]: hub.objects[one["value"]["oid"]] for one in lines if one["key"] == "lfsFile"}
            small = {
                one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
            }
            name = hub.commit(repo, {**large, **small}, revision)
            hub.repos[repo]["summary"] = lines[0]["value"]["summary"]
            self.answer(200, {"success": True, "commitOid": name, "commitUrl": f"{hub.url}/{repo}/commit/{name}"})
        else:
            files, siblings = hub.files(repo, revision), []
            for path, content in files.items():
                size = hub.sizes.get(path, len(content))
                siblings.append({"rfilename": path, "size": size, "blobId": hashlib.sha1(content).hexdigest()})
                if path.endswith(".safetensors") and (told := hub.told(path, content)):
                    siblings[-1]["lfs"] = {"sha256": told, "size": len(content), "pointerSize": 134}
            commit = hub.repos[repo]["branches"].get(revision, revision)
            private = hub.repos[repo]["private"]
            self.answer(200, {"id": repo, "sha": commit, "private": private, "tags": [], "siblings": siblings})

    def file(self, repo, revision, path, known):
        hub = self.server
        if self.missing(repo, revision, known):
            return
        content = hub.files(repo, revision).get(path)
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        commit = hub.repos[repo]["branches"].get(revision, revision)
        self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)


@contextmanager
def toy_hub():
    """A hub that answers as long as this lasts."""
    hub = ToyHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

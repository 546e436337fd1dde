"""A small server on loopback that speaks the endpoints by which `huggingface_hub` uploads and downloads a folder."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """
    Keeps repositories in memory: `repositories[name][revision][path]` is a file's content.

    Args:
        fault (`str`, *optional*): `"401"` or `"403"` for every write, `"500"` or `"drop"` for uploads of large files.
    """

    def __init__(self, fault: str | None = None):
        self.fault, self.repositories, self.large, self.private = fault, {}, {}, {}
        self.requests = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
                status, answer, headers = hub.answer(self.command, self.path, body)
                if status is None:  # the connection breaks in the middle of an answer
                    self.close_connection = True
                    self.connection.close()
                    return
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_HEAD = handle_request

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def downloads(self) -> set[str]:
        """The files that were fetched."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in self.requests if "/resolve/" in path}

    def answer(self, method: str, address: str, body: bytes) -> tuple[int | None, dict | list | bytes, dict]:
        path = address.split("?")[0]
        if method in ("GET", "HEAD"):
            return self.read(path)
        if self.fault in ("401", "403"):
            return int(self.fault), {"error": "Invalid credentials"}, {}
        status, answer = self.write(method, path, body, create_pr="create_pr=1" in address)
        return status, answer, {}

    # ------------------------------------------------------------------------------------------------------- downloads

    def read(self, path: str) -> tuple[int, dict | list | bytes, dict]:
        missing = 404, {"error": f"not found: {path}"}, {"X-Error-Code": "EntryNotFound"}
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self.files(match[1], match[2]).get(match[3])
            if content is None:
                return missing
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return 200, content, {"ETag": etag, "X-Repo-Commit": commit_of(self.name_of(match[1], match[2]))}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            files = self.files(match[1], match[2])
            return 200, [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()], {}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path)
        if match and match[1] in self.repositories:
            revision = match[2] or "main"
            siblings = [{"rfilename": name} for name in self.files(match[1], revision)]
            answer = {"id": match[1], "sha": commit_of(revision), "siblings": siblings}
            return 200, answer | {"private": bool(self.private.get(match[1]))}, {}
        return missing

    def name_of(self, repository: str, revision: str) -> str:
        """The branch that a name or a commit stands for."""
        branches = self.repositories.get(repository, {})
        return next((branch for branch in branches if revision in (branch, commit_of(branch))), "main")

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        return self.repositories.get(repository, {}).get(self.name_of(repository, revision), {})

    # --------------------------------------------------------------------------------------------------------- uploads

    def write(self, method: str, path: str, body: bytes, create_pr: bool) -> tuple[int | None, dict]:
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "me", request["name"])))
            private = request.get("visibility") == "private" or request.get("private") is True
            self.private.setdefault(name, private)
            known = name in self.repositories
            self.repositories.setdefault(name, {"main": {}})
            return 409 if known else 200, {"url": f"{self.address}/{name}", "name": name, "error": "it exists"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.repositories[match[1]].setdefault(match[2], {})
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.address}/large/{item['oid']}"}}
                objects.append(item | ({} if item["oid"] in self.large else {"actions": upload}))
            return 200, {"transfer": "basic", "objects": objects}
        if method == "PUT" and path.startswith("/large/"):
            if self.fault is not None:
                return (500, {"error": "Internal Server Error"}) if self.fault == "500" else (None, {})
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            files = self.repositories[match[1]].setdefault("pr" if create_pr else match[2], {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            url = f"{self.address}/{match[1]}"
            commit = {"commitUrl": f"{url}/commit/{'a' * 40}", "commitOid": "a" * 40}
            return 200, commit | {"pullRequestUrl": f"{url}/discussions/1"}
        return 404, {"error": f"not found: {method} {path}"}


def commit_of(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()

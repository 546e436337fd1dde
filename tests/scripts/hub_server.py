"""A small server on loopback that speaks the endpoints by which `huggingface_hub` uploads a folder."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer:
    """
    Keeps repositories in memory: `repositories[name][revision][path]` is a file's content.

    Args:
        fault (`str`, *optional*): `"401"` for every write, `"500"` or `"drop"` for the upload of large files.
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
                status, answer = hub.answer(self.command, self.path.split("?")[0], body, self.path)
                if status is None:  # the connection breaks in the middle of an answer
                    self.close_connection = True
                    self.connection.close()
                    return
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
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

    def answer(self, method: str, path: str, body: bytes, whole: str) -> tuple[int | None, dict]:
        if self.fault == "401":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            request = json.loads(body)
            name = "/".join(filter(None, (request.get("organization") or "me", request["name"])))
            self.private.setdefault(name, request.get("visibility") == "private" or request.get("private") is True)
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
            revision = "pr" if "create_pr=1" in whole else match[2]
            files = self.repositories[match[1]].setdefault(revision, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large[value["oid"]]
            url = f"{self.address}/{match[1]}"
            commit = {"commitUrl": f"{url}/commit/{'a' * 40}", "commitOid": "a" * 40}
            return 200, commit | {"pullRequestUrl": f"{url}/discussions/1"}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] in self.repositories:
                siblings = [{"rfilename": name} for name in self.repositories[match[1]]["main"]]
                return 200, {"id": match[1], "sha": "a" * 40, "siblings": siblings}
        return 404, {"error": f"not found: {method} {path}"}

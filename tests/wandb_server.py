"""A stand-in for the server of Weights & Biases, on loopback: it takes the real client through whole runs, and fails when told to.

It shows what the client sends, not what the real server accepts. `python tests/wandb_server.py [--fail 500] [--after 20] ...` runs
one until its standard input is closed, and prints its address first.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "89abcdef"  # of the right length; the client refuses others
ENTITY = "someone"


@dataclass
class Behaviour:
    """What happens to requests from the `after`-th one on. Nothing set: they are answered."""

    fail: int = 0  # this HTTP code
    delay: float = 0.0  # seconds before each answer
    silent: bool = False  # never an answer
    closes: bool = False  # the connection is closed without one
    after: int = 0
    until: int | None = None


@dataclass
class Artifact:
    """A version of an artifact as it was committed, with the manifest that was uploaded for it."""

    name: str
    type: str
    aliases: list[str]
    metadata: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    committed: bool = False


@dataclass
class ServedRun:
    """What the server knows of a run. `history`: line number -> row, as the real one keeps it."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # system metrics
    console: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    upserts: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    posts: int = 0  # of the file stream
    exit: int | None = None

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[line] for line in sorted(self.history)]

    def settings(self, key: str) -> Any:
        """The newest value that the client gave for `displayName`, `groupName`, `tags`, ..."""
        return next((upsert[key] for upsert in reversed(self.upserts) if upsert.get(key) not in (None, [], "")), None)


class Server:
    """With it, a server is up; `env` is what a client needs to reach it."""

    def __init__(self, key: str = "", **behaviour: Any) -> None:
        """`key`: the only one that is accepted, others get 401; by default all are. `behaviour`: that of `Behaviour`."""
        self.behaviour, self.key = Behaviour(**behaviour), key
        self.runs: dict[str, ServedRun] = {}
        self.requests: list[str] = []
        self.unknown: set[str] = set()  # operations that this stand-in has no answer for
        self.lock, self.closing = threading.RLock(), threading.Event()
        self.http = _Server(("127.0.0.1", 0), _Handler)
        self.http.stub = self
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def env(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key or KEY}

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody answers at `url` any more."""
        if self.closing.is_set():
            return
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def run(self, name: str) -> ServedRun:
        return self.runs.setdefault(name, ServedRun())

    def only(self) -> ServedRun:
        """The one run that there is."""
        assert len(self.runs) == 1, sorted(self.runs)
        return next(iter(self.runs.values()))

    # What is asked in GraphQL: one method an operation, named like it.

    def UpsertBucket(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.run(v.get("name") or "unnamed")
        run.upserts.append(v)
        run.config |= json.loads(v.get("config") or "{}")
        run.summary |= json.loads(v.get("summaryMetrics") or "{}")
        return {"upsertBucket": {"bucket": self._bucket(v["name"], run, v.get("project")), "inserted": len(run.upserts) == 1}}

    def RunResumeStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        bucket = self._bucket(v["name"], run, v.get("project")) if run and run.upserts else None
        return {"model": {"id": "UDo=", "name": v.get("project"), "entity": {"id": "RTo=", "name": ENTITY}, "bucket": bucket}}

    def _bucket(self, name: str, run: ServedRun, project: str | None) -> dict[str, Any]:
        tail = json.dumps([json.dumps(row) for row in run.rows()[-1:]])
        shown = {"id": "UnVuOg==", "name": name, "displayName": run.settings("displayName") or name, "description": "",
                 "notes": run.settings("notes"), "tags": run.settings("tags") or [], "group": run.settings("groupName"),
                 "jobType": run.settings("jobType"), "config": json.dumps(run.config), "sweepName": None,
                 "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history), "historyTail": tail,
                 "eventsLineCount": len(run.events), "eventsTail": "[]", "logLineCount": len(run.console),
                 "wandbConfig": json.dumps({"t": 1}), "stopped": False}  # fmt: skip
        return {**shown, "project": {"id": "UDo=", "name": project or "none", "entity": {"id": "RTo=", "name": ENTITY}}}

    def Viewer(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "VXNlcjox", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}",
                           "teams": {"edges": []}}}  # fmt: skip

    def CreateRunFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v.get("files") or []]
        return {"createRunFiles": {"runID": "UnVuOg==", "uploadHeaders": [], "files": files}}

    def NotifyScriptableRunAlert(self, v: dict[str, Any]) -> dict[str, Any]:
        self.run(v["runName"]).alerts.append({key: v.get(key) for key in ("title", "text", "severity")})
        return {"notifyScriptableRunAlert": {"success": True}}

    def CreateArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        given = v["input"]
        run, name = self.run(given["runName"]), given["artifactCollectionName"]
        aliases = [alias["alias"] for alias in given.get("aliases") or []]
        run.artifacts.append(Artifact(name, given["artifactTypeName"], aliases, json.loads(given.get("metadata") or "{}")))
        sequence = {"id": "QXNxOg==", "latestArtifact": None}
        artifact = {"id": f"{given['runName']}.{len(run.artifacts) - 1}", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def CreateArtifactManifest(self, v: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "RmlsZTo=", "name": v["name"], "displayName": v["name"], "uploadHeaders": [],
                "uploadUrl": f"{self.url}/manifest/{v['artifactID']}"}  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": "TWFuOg==", "file": file}}}

    def CommitArtifact(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(v["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": ""}}}

    def CreateArtifactFiles(self, v: dict[str, Any]) -> dict[str, Any]:
        def node(spec: dict[str, Any]) -> dict[str, Any]:
            file = f"{spec['artifactID']}/{spec['name']}"
            return {"id": "RmlsZTo=", "name": spec["name"], "displayName": spec["name"], "storagePath": file,
                    "uploadUrl": f"{self.url}/artifact/{file}", "uploadHeaders": [], "uploadMultipartUrls": None,
                    "artifact": {"id": spec["artifactID"]}}  # fmt: skip

        return {"createArtifactFiles": {"files": {"edges": [{"node": node(spec)} for spec in v["input"]["artifactFiles"]]}}}

    def _artifact(self, number: str) -> Artifact:
        run, _, n = number.rpartition(".")
        return self.runs[run].artifacts[int(n)]

    def ServerFeaturesQuery(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def RunStoppedStatus(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def QueryRunInfo(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.run(v["run"])
        return {"project": {"run": {"displayName": run.settings("displayName"), "summaryMetrics": json.dumps(run.summary)}}}

    def OrganizationCoreWeaveOrganizationID(self, v: dict[str, Any]) -> None:
        return None

    def ArtifactType(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def FetchArtifactDigestAlgorithm(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}

    def XXHashDigestsEnabled(self, v: dict[str, Any]) -> dict[str, Any]:
        return {"entity": None}

    # And what is not: the stream of a run's files, and uploads.

    def stream(self, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        run = self.run(name)
        run.posts += 1
        for file, chunk in (sent.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.history |= {chunk["offset"] + i: json.loads(line) for i, line in enumerate(chunk["content"])}
            elif file == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
            elif file == "wandb-events.jsonl":
                run.events += [json.loads(line) for line in chunk["content"]]
            else:
                run.console += chunk["content"]
        if sent.get("complete") is not None:
            run.exit = sent.get("exitcode")
        return {"limits": {"heartbeat_seconds": 3}, "stopped": False}

    def upload(self, path: str, content: bytes) -> None:
        kind, number, name = (*path.strip("/").split("/", 2), "")[:3]
        if kind == "upload":
            self.run(number).files[name] = content
        elif kind == "manifest":
            self._artifact(number).manifest = json.loads(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    stub: Server

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET " + self.path, b"")

    def do_POST(self) -> None:
        content = self._body()
        if self.path == "/graphql":
            asked = json.loads(content)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            name = asked.get("operationName") or (found.group(1) if found else "?")
            return self._answer(name, json.dumps(asked.get("variables") or {}).encode())
        self._answer("POST " + self.path, content)

    def do_PUT(self) -> None:
        self._answer("PUT " + self.path.partition("?")[0], self._body())

    def _answer(self, what: str, content: bytes) -> None:
        stub = self.server.stub
        with stub.lock:
            stub.requests.append(what)
            b, number = stub.behaviour, len(stub.requests) - 1
        active = number >= b.after and (b.until is None or number < b.until)
        if active and (b.silent or b.delay):
            stub.closing.wait(b.delay or None)
        if active and (b.closes or b.silent):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif active and b.fail:
            self._send({"error": "as the test asks"}, b.fail)
        elif not self._authorized():
            self._send({"errors": [{"message": "invalid key"}]}, 401)
        else:
            with stub.lock:
                answer = self._do(stub, what, content)
            self._send(answer)

    def _authorized(self) -> bool:
        """Where the client says who it is: it does not with uploads, whose addresses are secrets."""
        given, key = self.headers.get("Authorization", ""), self.server.stub.key
        return not key or given in ("", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())

    def _do(self, stub: Server, what: str, content: bytes) -> dict[str, Any]:
        if stream := re.fullmatch(r"POST /files/[^/]+/[^/]+/([^/]+)/file_stream", what):
            return stub.stream(stream.group(1), json.loads(content))
        if what.startswith("PUT "):
            stub.upload(what[4:], content)
            return {}
        if what.startswith("POST /sdk/otel/"):  # how the client itself is doing
            return {}
        operation = getattr(stub, what, None) if re.fullmatch(r"[A-Z]\w+", what) else None
        if operation is None:
            stub.unknown.add(what)
            return {"data": {}, "errors": [{"message": f"the stand-in has no {what}"}]}
        return {"data": operation(json.loads(content))}

    def _body(self) -> bytes:
        content = b""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _send(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--closes", action="store_true")
    with Server(**vars(parser.parse_args())) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps({name: {"rows": len(run.history), "exit": run.exit} for name, run in server.runs.items()}), flush=True)


if __name__ == "__main__":
    main()

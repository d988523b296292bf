"""A server on loopback that answers like Weights & Biases and keeps the history of a run."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Row = dict[str, Any]


class WandbServer:
    """One run, as the server knows it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.created: dict[str, Any] = {}
        """Variables of the request that created the run."""

        self.requests: list[str] = []
        """Paths of all requests."""

        self.exit_codes: list[int] = []
        self.sleeps = threading.Event()
        """Set while the server answers nothing."""

        self.url = ""

    @property
    def rows(self) -> list[Row]:
        """The history: one row for each step."""
        return [json.loads(line) for line in self.lines]

    def curve(self, key: str) -> list[tuple[int, float]]:
        return [(row["_step"], row[key]) for row in self.rows if key in row]

    def stream(self, content: Row) -> None:
        for name, part in content.get("files", {}).items():
            if name == "wandb-history.jsonl":
                # A client that begins again at offset 0 replaces what was there
                self.lines[part["offset"] :] = part["content"]
        if content.get("complete"):
            self.exit_codes.append(content["exitcode"])

    def answer(self, query: str, variables: Row) -> Row:
        project = {"id": "p", "name": "zeroflow", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "r", "name": variables.get("name"), "displayName": "mine", "config": "{}"}
        if "mutation UpsertBucket" in query:
            self.created = self.created or variables
            found = bucket | {"project": project, "historyLineCount": len(self.lines)}
            return {"upsertBucket": {"bucket": found, "inserted": not self.lines}}
        if "query RunResumeStatus" in query:
            counts = {"logLineCount": 0, "eventsLineCount": 0, "historyLineCount": len(self.lines)}
            tails = {"eventsTail": "[]", "historyTail": json.dumps(self.lines[-1:])}
            rest = {"summaryMetrics": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
            there = bucket | counts | tails | rest if self.lines else None
            return {"model": project | {"bucket": there}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    known = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            known.requests.append(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            while known.sleeps.is_set() and not stopping.is_set():
                stopping.wait(0.05)
            answer: Row = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                answer = {"data": known.answer(asked["query"], asked.get("variables") or {})}
            elif self.path.endswith("/file_stream"):
                known.stream(json.loads(body))
            content = json.dumps(answer).encode()
            with suppress(OSError):  # the client did not wait
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def do_PUT(self) -> None:
            self.do_POST()

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    stopping = threading.Event()
    server = Quiet(("127.0.0.1", 0), Handler)
    known.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield known
    stopping.set()
    server.shutdown()
    server.server_close()

"""Receivers of messages on loopback: a webhook, and a mail server."""

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_string
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Received:
    """Messages in the order in which they came, each as its subject and its text."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str]] = []
        self.mails: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        """Addresses of the receivers, in the form of Apprise."""


@contextmanager
def receivers() -> Iterator[Received]:
    received = Received()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.posts.append((sent["title"], sent["message"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Mail(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self._answer(220)
            for line in self.rfile:
                command = line[:4].decode().upper()
                self._answer({"DATA": 354, "QUIT": 221}.get(command, 250))
                if command == "DATA":
                    received.mails.append(self._mail())
                    self._answer(250)

        def _answer(self, code: int) -> None:
            self.wfile.write(f"{code} yes\r\n".encode())

        def _mail(self) -> tuple[str, str]:
            lines = iter(lambda: self.rfile.readline().decode().rstrip("\r\n"), ".")
            mail: Any = message_from_string("\n".join(lines), policy=default)
            return str(mail["Subject"]), mail.get_body(("plain",)).get_content()

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    mail = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
    received.addresses = [
        f"json://127.0.0.1:{hook.server_address[1]}/s3cret",
        f"mailto://127.0.0.1:{mail.server_address[1]}?from=a@example.com&to=b@example.com"
        "&mode=insecure",
    ]
    for server in (hook, mail):
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield received
    for server in (hook, mail):
        server.shutdown()
        server.server_close()

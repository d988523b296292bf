"""A real MLflow server, which can be lost."""

import os
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from patience import wait_until
from pipeline import free_port

from zeroflow.tracking.viewer import viewer


class Server:
    """The server of `zeroflow ui`, which can die and come back at its port."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://me:s3cret@127.0.0.1:{port}"
        self._viewer = viewer(folder, port)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._viewer.command is not None
        self._process = subprocess.Popen(
            self._viewer.command,
            env=self._viewer.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self._answers)

    def kill(self) -> None:
        """With its workers, as by a power cut."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the server ended"
        try:
            return self.status("GET", "/health") == 200
        except OSError:
            return False

    def command_line(self) -> str:
        """All that `ps` shows of it."""
        assert self._process is not None
        main = psutil.Process(self._process.pid)
        return " ".join(word for one in (main, *main.children()) for word in one.cmdline())

    def status(self, method: str, path: str, **headers: str) -> int:
        """Status of the answer to a request."""
        content = b"{}" if method == "POST" else None
        headers |= {"Content-Type": "application/json"}
        url = f"{self._viewer.address}{path}"
        request = urllib.request.Request(url, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

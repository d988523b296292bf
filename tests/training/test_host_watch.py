import threading
import time
from pathlib import Path

import psutil
import pytest
from patience import wait_until

from zeroflow.run_folder import RunFolder
from zeroflow.training.host_watch import (
    SILENT_SECONDS,
    Neighbours,
    interface_to,
    wait_for_job,
    watch,
)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, by the clock that cannot be set."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_silent_machine_is_detected_unless_it_never_gave_a_sign(tmp_path: Path, passed):
    folder = RunFolder(tmp_path)
    Neighbours(folder, 2, 4).silent()  # of an earlier attempt
    first, second = Neighbours(folder, 0, 3), Neighbours(folder, 1, 3)
    for _ in range(3):
        passed[0] += SILENT_SECONDS / 2
        assert second.silent() == first.silent() == []
    passed[0] += SILENT_SECONDS / 2
    assert first.silent() == []
    passed[0] += SILENT_SECONDS
    [name] = first.silent()
    assert name in (folder.beats / "1").read_text()
    assert second.silent() == [], "the first is heard again"


def test_interface_is_that_of_the_route_and_none_for_the_loopback():
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-machine.invalid") is None
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                assert interface_to(address.address) == name


def test_ranks_end_while_a_failure_is_answered_and_wait_before_they_start(tmp_path: Path):
    folder = RunFolder(tmp_path)
    reasons: list[str] = []

    def end(why: str) -> None:
        reasons.append(why)
        raise SystemExit  # of the thread; a rank ends as a whole

    folder.pause.touch()
    watch(folder, end)
    wait_until(lambda: bool(reasons), "the end")
    assert "after a failure" in reasons[0]
    starting = threading.Thread(target=wait_for_job, args=(folder,))
    starting.start()
    starting.join(0.2)
    assert starting.is_alive()
    folder.pause.unlink()
    starting.join(60)
    assert not starting.is_alive()

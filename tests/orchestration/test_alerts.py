"""Alerts: settings, automations, and messages that a real server sends to receivers on loopback."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from patience import wait_until
from pipeline import api
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Crashed
from pydantic import ValidationError
from receivers import Received, receivers

from zeroflow.cli import commands
from zeroflow.orchestration import alerts, server
from zeroflow.orchestration.flows import FLOWS
from zeroflow.orchestration.names import FLOW_NAMES, PRETRAIN
from zeroflow.settings.alerts import CONDITIONS, AlertConfig
from zeroflow.settings.flags import error_message

SLACK = "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7FQ"
MAIL = "mailtos://me:s3cret@mail.example?to=you@example.com"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "addresses"


def test_addresses_are_the_lines_of_a_file_without_comments(file):
    file.write_text(f"# our channel\n{SLACK}\n\n  {MAIL}  \n")
    assert alerts.addresses(file) == [SLACK, MAIL]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no addresses"),
        ("# nothing\n\n", "has no addresses"),
        (f"{SLACK}\nhttp//s3cret", "line 2 of .* is not an address"),
        ("s3cret://s3cret", "line 1 of .* is not an address"),
    ],
)
def test_wrong_address_is_refused_by_its_line_and_not_shown(file, content, message, caplog, capfd):
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        alerts.addresses(file)
    assert "s3cret" not in f"{refused.value}{caplog.text}{capfd.readouterr()}"


def test_missing_file_is_named(file, console, capfd):
    set_up("--alert-to", file, code=1)
    assert f"{file}" in capfd.readouterr().err


def test_address_on_the_command_line_is_refused_and_not_shown():
    with pytest.raises(ValidationError) as refused:
        AlertConfig(alert_to=SLACK)
    message = error_message(refused.value)
    assert "--alert-to names a file" in message and "hooks" not in message


def test_removing_and_setting_alerts_at_once_is_refused():
    with pytest.raises(ValidationError, match="drop it"):
        AlertConfig(no_alerts=True, alert_on=("done",))


def test_automations_wait_for_failed_and_crashed_runs_of_our_flows_and_for_our_events():
    made = {condition: alerts.automation_of(condition, uuid4()) for condition in CONDITIONS}
    assert len({automation.name for automation in made.values()}) == len(CONDITIONS)
    events = [event for automation in made.values() for event in automation.trigger.expect]
    assert events == [
        "prefect.flow-run.Failed",
        "prefect.flow-run.Crashed",
        "zeroflow.spike",
        "zeroflow.out-of-band",
        "zeroflow.done",
    ]
    for condition in ("failed", "crashed"):
        related = made[condition].trigger.match_related
        assert related["prefect.resource.name"] == [*FLOWS] == [*FLOW_NAMES]
    [sent] = made["done"].actions
    assert "{{ event.payload.message }}" in sent.body


@pytest.fixture
def client(prefect_api: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        yield client
        alerts.set_alerts(AlertConfig(no_alerts=True), [], client)


def automations(client: SyncPrefectClient) -> list[str]:
    return sorted(found.name for found in client.read_automations() if "alert" in found.name)


def set_up(*flags: object, code: int = 0) -> None:
    assert commands.main(["prefect-setup", *map(str, flags)]) == code


@flow(name=PRETRAIN)
def watched() -> None:
    for condition in ("spike", "out-of-band", "done"):
        alerts.emit(condition, "mine", f"{condition} at step 7")


@flow(name="of somebody else")
def other() -> None:
    raise ValueError("not ours")


def test_server_sends_messages_to_every_address_until_alerts_are_removed(
    client, file, prefect_api, console, capfd, monkeypatch
):
    set_up("--alert-on", "done", code=1)
    assert "add --alert-to" in capfd.readouterr().err
    with receivers() as received:
        file.write_text("\n".join(received.addresses))
        for _ in range(2):
            set_up("--alert-to", file)
            assert automations(client) == sorted(map(alerts.automation_name, CONDITIONS))
        blocks = api(prefect_api, "/block_documents/filter", include_secrets=False)
        [block] = [block for block in blocks if block["name"] == alerts.BLOCK]
        assert "s3cret" not in str(block)

        assert FLOWS[PRETRAIN]({"seed": "none"}, return_state=True).is_failed()
        watched()
        with pytest.raises(ValueError, match="not ours"):
            other()
        gone = client.create_flow_run(watched, name="gone").id
        client.set_flow_run_state(gone, Crashed(message="No heartbeat."), force=True)
        server.deliver()
        wait_until(lambda: len(received.posts) >= 5 and len(received.mails) >= 5)
        assert_told(received)

        set_up("--alert-on", "done")
        assert automations(client) == [alerts.automation_name("done")]
        watched()
        server.deliver()
        wait_until(lambda: len(received.posts) >= 6)
        assert received.posts[5][0] == "zeroflow: mine is complete"

    set_up("--no-alerts")
    assert automations(client) == [] and "s3cret" not in str(capfd.readouterr())
    set_up("--alert-on", "done", code=1)


def assert_told(received: Received) -> None:
    told = dict(sorted(received.posts))
    assert len(received.posts) == len(received.mails) == 5, "one message for each condition"
    assert {subject for subject, _ in received.mails} == told.keys()
    assert told["zeroflow: pretrain · refused failed"].startswith("--seed: ")
    assert told["zeroflow: gone crashed"].startswith("No heartbeat.")
    for condition, words in (("spike", "has a spike"), ("out-of-band", "is out of band")):
        assert told[f"zeroflow: mine {words}"].startswith(f"{condition} at step 7")
    page = told["zeroflow: mine is complete"].splitlines()[-1]
    assert page.startswith("http://127.0.0.1:") and "/runs/flow-run/" in page

"""Alerts about runs: automations of a Prefect server, which send messages to Slack or by mail.

The server sends the messages, so it must keep running after the run. It stores the addresses
encrypted, in a block. `zeroflow prefect-setup` creates the block and the automations, and
finds them again by their names.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from zeroflow.orchestration.names import FLOW_NAMES
from zeroflow.settings.alerts import CONDITIONS, AlertConfig, Condition, Noticed
from zeroflow.text.redaction import redacted

BLOCK = "zeroflow-alerts"
"""Name of the block with the addresses."""

_BLOCK_TYPE = "slack-webhook"


class _Message(NamedTuple):
    event: str
    """Event on the server."""

    words: str
    """End of the automation's name, and of the subject."""

    by_prefect: bool = False
    """True if Prefect emits the event for each flow run; otherwise a run emits it."""


_MESSAGES: dict[Condition, _Message] = {
    "failed": _Message("prefect.flow-run.Failed", "failed", by_prefect=True),
    "crashed": _Message("prefect.flow-run.Crashed", "crashed", by_prefect=True),
    "spike": _Message("zeroflow.spike", "has a spike"),
    "out-of-band": _Message("zeroflow.out-of-band", "is out of band"),
    "done": _Message("zeroflow.done", "is complete"),
}


def emit(condition: Noticed, name: str, message: str) -> None:
    """Emit the event of a condition that the run or sweep `name` has detected."""
    emit_event(
        _MESSAGES[condition].event,
        resource={"prefect.resource.id": f"zeroflow.run.{name}", "prefect.resource.name": name},
        payload={"message": redacted(message)},
    )


def set_alerts(config: AlertConfig, found: list[str], client: SyncPrefectClient) -> list[Condition]:
    """Create, change or remove block and automations on the server of `client`.

    Args:
        found: addresses of the file in `config`; empty to keep those that the server has.

    Returns:
        the alert conditions that are active from now on.

    Raises:
        ValueError: the server has no addresses.
    """
    block = _saved(found) if found else _existing(client)
    if config.alert_on and block is None:
        raise ValueError("the server has no addresses for alerts: add --alert-to")
    chosen = () if config.no_alerts else config.alert_on or CONDITIONS
    wanted = [condition for condition in CONDITIONS if condition in chosen]
    for condition in CONDITIONS:
        there = client.read_automations_by_name(automation_name(condition))
        if condition not in wanted:
            for automation in there:
                client.delete_automation(automation.id)
        elif block is not None and there:
            client.update_automation(there[0].id, automation_of(condition, block))
        elif block is not None:
            client.create_automation(automation_of(condition, block))
    if config.no_alerts and block is not None:
        client.delete_block_document(block)
    return wanted


def addresses(file: Path) -> list[str]:
    """Return the addresses in `file`: its lines, except empty ones and those that begin with #.

    Raises:
        ValueError: there is no address, or Apprise does not recognise one. The message does not
            contain the address, which is a secret.
    """
    from apprise import Apprise

    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # it logs bad addresses
    lines = enumerate(map(str.strip, file.read_text(encoding="utf-8-sig").splitlines()), 1)
    found = {number: line for number, line in lines if line and not line.startswith("#")}
    for number, address in found.items():
        if not Apprise().add(address):
            raise ValueError(
                f"line {number} of {file} is not an address that Apprise knows, such as "
                "https://hooks.slack.com/services/... or mailtos://USER:PASSWORD@SERVER?to=ADDRESS"
            )
    if not found:
        raise ValueError(f"{file} has no addresses: write one on each line")
    return list(found.values())


def automation_name(condition: Condition) -> str:
    return f"zeroflow: alert if a run {_MESSAGES[condition].words}"


def automation_of(condition: Condition, block: UUID) -> AutomationCore:
    """Return the automation that sends the messages of `condition` to the addresses in `block`."""
    event, words, by_prefect = _MESSAGES[condition]
    name, text = "{{ event.resource.name }}", "{{ event.payload.message }}"
    of_our_flows: dict[str, object] = {}
    if by_prefect:
        name, text = "{{ flow_run.name }}", "{{ flow_run.state.message }}"
        flows = {"prefect.resource.role": "flow", "prefect.resource.name": [*FLOW_NAMES]}
        of_our_flows = {
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "match_related": flows,
        }
    page = "{% if flow_run and flow_run|ui_url %}\n{{ flow_run|ui_url }}{% endif %}"
    return AutomationCore(
        name=automation_name(condition),
        description="Created by `zeroflow prefect-setup`.",
        trigger=EventTrigger(expect={event}, posture=Posture.Reactive, **of_our_flows),
        actions=[
            SendNotification(
                block_document_id=block, subject=f"zeroflow: {name} {words}", body=text + page
            )
        ],
    )


def _saved(found: list[str]) -> UUID:
    """Save the addresses in the block, and return its id."""
    # Prefect's only block that takes any address of Apprise, and several in one string
    from prefect.blocks.notifications import SlackWebhook

    block: Any = SlackWebhook(url=" ".join(found)).save(BLOCK, overwrite=True)
    return UUID(str(block))


def _existing(client: SyncPrefectClient) -> UUID | None:
    try:
        return client.read_block_document_by_name(BLOCK, _BLOCK_TYPE).id
    except ObjectNotFound:
        return None

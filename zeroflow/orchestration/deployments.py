"""Set-up of a Prefect server: work pool, limit, crash detection, alerts."""

import logging
import shlex
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import temporary_settings

from zeroflow.orchestration.alerts import addresses, set_alerts
from zeroflow.orchestration.early_server import USUAL_PORT
from zeroflow.orchestration.names import AUTOMATION, GPU_LIMIT, PRETRAIN, WORK_POOL
from zeroflow.orchestration.server import api_in_use
from zeroflow.settings.alerts import AlertConfig

log = logging.getLogger(__name__)

DEPLOYMENTS = Path(__file__).with_name("prefect.yaml")

DEPLOY = f"prefect deploy --all --prefect-file {shlex.quote(str(DEPLOYMENTS))}"
"""The command that creates the deployments, or updates those of another version."""

WAITS = "Runs wait for a worker, which `zeroflow ui` starts."
"""End of the description of each deployment: without our programs, nothing else says so."""

_POOL = (
    "Runs wait here, in state Late, until a worker takes them. `zeroflow ui` starts a worker, and "
    "writes into the state of each run why it waits."
)

# Five of Prefect's heartbeats, which come every 180 s. With 90 s, a server that was unavailable for
# 120 s marked live runs as crashed
SILENCE = timedelta(minutes=15)

_UNCHANGED = AlertConfig()


def set_up(silence: timedelta = SILENCE, alerts: AlertConfig = _UNCHANGED) -> None:
    """Create the work pool, the limit of one GPU job at a time, an automation, and alerts.

    The automation marks a flow run as crashed if its process has ended without a final state, so
    that the run can be retried. An existing work pool or limit is not changed.

    Args:
        silence: time without a heartbeat after which a process is considered dead. After a server
            outage of that length, live runs are shown as crashed until they end.
        alerts: alerts to create, change or remove.

    Raises:
        RuntimeError: no server answers.
        ValueError: the addresses of the alerts cannot be used.
    """
    from prefect.workers.process import ProcessWorker  # its import sets up logging

    found = addresses(alerts.alert_to) if alerts.alert_to else []
    if (api := api_in_use()) is None:
        raise RuntimeError(
            f"no Prefect server answers on port {USUAL_PORT}: start one with `prefect server "
            "start`, or set PREFECT_API_URL to one"
        )
    with temporary_settings(api.settings), get_client(sync_client=True) as client:
        # First, because it may be refused, which must leave the server as it was
        conditions = set_alerts(alerts, found, client) if alerts.are_asked_for else []
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(
            name=WORK_POOL,
            description=_POOL,
            type="process",
            base_job_template=template,
        )
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(pool)
        with suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1)
            )
        automation = _crash_detection(silence)
        there = client.read_automations_by_name(AUTOMATION)
        if not there:
            client.create_automation(automation)
        elif _content(there[0]) != _content(automation):
            # The server gives the trigger a new id, and then misses the end of earlier heartbeats
            client.update_automation(there[0].id, automation)
    minutes = silence / timedelta(minutes=1)
    log.info("Prefect at %s has", api.page)
    log.info("  work pool   %s", WORK_POOL)
    log.info("  limit       %s, concurrent jobs on GPUs", GPU_LIMIT)
    log.info("  automation  %s, after %g minutes without a heartbeat", AUTOMATION, minutes)
    if alerts.are_asked_for:
        log.info("  alerts      %s", ", ".join(conditions) or "none")


def _content(automation: AutomationCore) -> dict[str, object]:
    """Return what the automation does, without its id."""
    return automation.model_dump(include=set(AutomationCore.model_fields))


def _crash_detection(silence: timedelta) -> AutomationCore:
    heartbeat = "prefect.flow-run.heartbeat"
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")
    return AutomationCore(
        name=AUTOMATION,
        description="Created by `zeroflow prefect-setup`.",
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": PRETRAIN},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{end}" for end in ends)},
            within=silence,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message="No heartbeat: its process was killed, or its machine stopped.",
            )
        ],
    )

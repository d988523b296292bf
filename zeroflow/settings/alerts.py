"""Settings of the alerts that `zeroflow prefect-setup` creates."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import WithJsonSchema, field_validator, model_validator

from zeroflow.config import Config

Noticed = Literal["spike", "out-of-band", "done"]
"""Alert conditions that a run detects itself."""

Condition = Literal["failed", "crashed", "spike", "out-of-band", "done"]
"""Alert conditions."""

CONDITIONS: tuple[Condition, ...] = ("failed", "crashed", "spike", "out-of-band", "done")

_File = Annotated[Path, WithJsonSchema({"type": "string", "format": "file-path"})]


class AlertConfig(Config):
    """Messages about runs, which the Prefect server sends."""

    alert_to: _File | None = None
    """File with the addresses to send messages to, one on each line: a webhook of Slack, mail
    through an SMTP server, or any other address of Apprise. Default: the addresses that the server
    already has."""

    alert_on: tuple[Condition, ...] = ()
    """Alert conditions. failed: a flow run failed. crashed: its process is gone. spike: an
    unusual loss, gradient norm or update. out-of-band: the loss left the band of earlier runs.
    done: a run or a sweep is complete. Default: all, if --alert-to is given."""

    no_alerts: bool = False
    """Remove the alerts and their addresses from the server."""

    @field_validator("alert_to", mode="before")
    @classmethod
    def _is_no_address(cls, given: Any) -> Any:
        if isinstance(given, str | Path) and ":/" in str(given):
            # Without the address, which is a secret
            raise ValueError(
                "--alert-to names a file, because everyone on this machine can see the addresses "
                "in a command: write them into a file that only you can read"
            )
        return given

    @model_validator(mode="after")
    def _removes_or_sets(self) -> Self:
        if self.no_alerts and (self.alert_to or self.alert_on):
            raise ValueError("--no-alerts removes all alerts: drop it, or the other flags")
        return self

    @property
    def are_asked_for(self) -> bool:
        return bool(self.alert_to or self.alert_on or self.no_alerts)

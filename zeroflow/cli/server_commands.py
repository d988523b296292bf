"""Commands that start or set up servers: Prefect's, MLflow's and the user interfaces."""

import signal
from argparse import Namespace as Arguments
from contextlib import suppress

from zeroflow.cli.arguments import Parser, add_settings, read_settings
from zeroflow.cli.command import Command
from zeroflow.cli.console import Terminated, require_writable, show, terminate
from zeroflow.cli.prefect_settings import importing_prefect
from zeroflow.orchestration.ui import UiConfig
from zeroflow.settings.alerts import AlertConfig


def _prefect_setup_arguments(parser: Parser) -> None:
    add_settings(parser, AlertConfig, "alerts")


def _prefect_setup(arguments: Arguments) -> None:
    alerts = AlertConfig.model_validate(read_settings(AlertConfig, arguments))
    with importing_prefect():
        from zeroflow.orchestration import deployments

    deployments.set_up(alerts=alerts)
    show(f"command that creates the deployments there: {deployments.DEPLOY}")


def _ui_arguments(parser: Parser) -> None:
    add_settings(parser, UiConfig, "ui")


def _ui(arguments: Arguments) -> None:
    from zeroflow.orchestration import ui

    config = UiConfig.model_validate(read_settings(UiConfig, arguments))
    require_writable(config.cache_dir)
    signal.signal(signal.SIGTERM, terminate)
    with importing_prefect():
        from zeroflow.orchestration import server as _  # noqa: F401, its errors are explained here
    with suppress(KeyboardInterrupt, Terminated):  # the normal way to stop the command
        ui.serve(config)


COMMANDS = (
    Command(
        "prefect-setup",
        "set up a Prefect server's work pool, crash detection and alerts",
        _prefect_setup_arguments,
        _prefect_setup,
        "Create the work pool, the limit of one GPU job at a time and the crash detection on a "
        "Prefect server. With --alert-to, the server also sends messages about runs. Without flags "
        "for alerts, existing alerts stay as they are.",
    ),
    Command(
        "ui",
        "start Prefect's and MLflow's user interfaces, and a worker",
        _ui_arguments,
        _ui,
        "Start Prefect's server with a form for each size, a worker for the runs that are started "
        "there, and MLflow. Ctrl-C stops everything.",
    ),
)

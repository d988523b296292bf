"""The deployments of the package."""

import importlib
from datetime import timedelta
from typing import Any

import pytest
import yaml
from pipeline import LOGINS, ROOT, api
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import temporary_settings

from zeroflow.orchestration import form
from zeroflow.orchestration.access import Api
from zeroflow.orchestration.deployments import DEPLOYMENTS, WAITS, set_up
from zeroflow.orchestration.names import AUTOMATION
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun

PLANNED = yaml.safe_load(DEPLOYMENTS.read_text(encoding="utf-8"))["deployments"]


@pytest.mark.parametrize("deployment", PLANNED, ids=lambda deployment: deployment["name"])
def test_deployment_names_a_flow_by_its_module_and_parameters_that_it_takes(deployment):
    module, _, name = deployment["entrypoint"].rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    assert flow.name == name.replace("_", "-")
    [(parameter, given)] = deployment["parameters"].items()
    config = {"run": RunConfig, "sweep": SweepConfig, "lab": ZeroLabRun}[parameter]
    assert form.filled(form.read(config, given)) == {key: given[key] for key in given if given[key]}
    assert [*flow.parameters.properties] == [parameter]
    assert deployment["description"].endswith(WAITS)


def test_file_at_the_root_equals_that_of_the_package():
    assert (ROOT / "prefect.yaml").resolve() == DEPLOYMENTS.resolve()


@pytest.mark.parametrize("name", ["pretrain", "sweep"])
def test_deployments_of_earlier_versions_find_their_flow(name):
    """They name a file of the working tree."""
    assert load_flow_from_entrypoint(f"{ROOT}/flows/{name}.py:{name}").name == name


def test_crash_detection_keeps_what_it_waits_for_when_it_is_set_up_again(prefect_api):
    """The server files heartbeats by the id of the trigger, which an update replaces."""

    def trigger() -> dict[str, Any]:
        found = api(
            prefect_api, "/automations/filter", automations={"name": {"any_": [AUTOMATION]}}
        )
        [automation] = found
        return automation["trigger"]

    with temporary_settings(Api(prefect_api, LOGINS[prefect_api]).settings):
        set_up()
        first = trigger()
        set_up()
        assert trigger()["id"] == first["id"]
        set_up(timedelta(minutes=1))
        assert trigger()["within"] == 60, "another time is a change"
        set_up()

"""The deployments of the package."""

import importlib

import pytest
import yaml
from pipeline import ROOT
from prefect.flows import load_flow_from_entrypoint

from zeroflow.orchestration import form
from zeroflow.orchestration.deployments import DEPLOYMENTS, WAITS
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

"""The forms of the flows in Prefect, checked by Prefect's own validation."""

from typing import Any

import pytest
from prefect.utilities.schema_tools import ValidationError as NotOfTheForm
from prefect.utilities.schema_tools import validate
from pydantic import ValidationError

from zeroflow.config import Config
from zeroflow.orchestration import form
from zeroflow.orchestration.flows import pretrain, prove_resume, sweep
from zeroflow.settings.flags import error_message, settings
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig, leaves
from zeroflow.settings.sweep import SweepConfig

FLOWS = [(pretrain, RunConfig), (sweep, SweepConfig)]
NESTED: dict[str, Any] = {
    "run_name": "mine",
    "seed": 3,
    "cache_dir": "/data",
    "model": {"size": "small"},
    "data": {"data_mode": "files", "data_path": ["a/*.txt", "b.jsonl"]},
    "tokenizer": {"tokenizer_name": "train", "vocab_size": 512},
    "training": {"max_steps": 5, "seq_len": 64, "learning_rate": 1e-3, "z_loss": 1e-5},
    "optimizer": {"name": "adamw", "beta1": 0.8},
}
FILLED: dict[str, Any] = {
    "run_name": "mine",
    "data_mode": "files",
    "data_path": ["a/*.txt", "b.jsonl"],
    "size": "small",
    "max_steps": 5,
    "seq_len": 64,
    "learning_rate": 1e-3,
    "tokenizer": {"tokenizer_name": "train", "vocab_size": 512},
    "training": {"z_loss": 1e-5},
    "optimizer": {"name": "adamw", "beta1": 0.8},
    "other": {"seed": 3},
    "cache_dir": "/data",
}


def fields(flow: Any) -> dict[str, dict[str, Any]]:
    """The fields of a flow's form, in the order in which Prefect shows them."""
    [parameter] = flow.parameters.properties.values()
    return dict(sorted(parameter["properties"].items(), key=lambda item: item[1]["position"]))


def all_fields(flow: Any) -> dict[str, dict[str, Any]]:
    """The fields of a flow's form, with those of its groups."""
    found = {}
    for name, field in fields(flow).items():
        found |= field.get("properties", {name: field})
    return found


def accepted(flow: Any, parameter: str, values: object) -> None:
    """Have Prefect validate `values`, as it does when a run is created."""
    schema = flow.parameters.model_dump_for_openapi()
    validate({parameter: values}, schema, raise_on_error=True)


def test_common_settings_come_first_and_groups_are_folded():
    first = ["run_name", "data_mode", "data_path", "dataset", "size", "max_steps", "seq_len"]
    names = [*fields(pretrain)]
    assert names[:8] == [*first, "learning_rate"] and names[-1] == "cache_dir"
    for name in names[8:-1]:
        defaults, chosen = fields(pretrain)[name]["anyOf"]
        assert (defaults["type"], chosen["type"]) == ("null", "object")
        assert [*chosen["properties"]] == [*fields(pretrain)[name]["properties"]]
    assert [*fields(sweep)][:5] == ["sweep_name", "sizes", "seeds", "learning_rates", "zero_stages"]


@pytest.mark.parametrize(("flow", "config"), FLOWS)
def test_form_has_every_setting_once_with_its_own_title(flow: Any, config: type[Config]):
    shown = all_fields(flow)
    assert {*shown} == {setting.path[-1] for setting in settings(config)}
    titles = [field["title"].lower() for field in shown.values()]
    assert len({*titles, "run name"}) == len(titles) + 1, "Prefect itself asks for a Run Name"
    for setting in settings(config):
        description = shown[setting.path[-1]]["description"]
        assert description.endswith(f"Flag: {setting.flag}.")
        assert description.startswith(" ".join((setting.field.description or "").split()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_steps", "At least 1."),
        ("seq_len", "At least 2."),
        ("seed", "At least 0."),
        ("learning_rate", "More than 0."),
        ("validation_fraction", "More than 0, less than 1."),
        ("vocab_size", "At least 300, at most 2,147,483,647."),
        ("run_name", "Letters, digits, dots, dashes and underscores, at most 100."),
    ],
)
def test_descriptions_contain_the_bounds(name: str, words: str):
    assert f" {words} Flag: " in all_fields(pretrain)[name]["description"]


def test_settings_survive_the_way_through_the_form():
    run = RunConfig.model_validate(NESTED)
    assert form.filled(run) == FILLED
    assert form.read(RunConfig, FILLED) == run
    assert form.filled(form.read(RunConfig, FILLED)) == FILLED
    assert form.read(RunConfig, run) is run
    accepted(pretrain, "run", FILLED)


def test_settings_may_be_nested_as_in_run_json():
    assert form.read(RunConfig, NESTED) == RunConfig.model_validate(NESTED)
    accepted(pretrain, "run", NESTED)
    nested = {"seeds": [0, 1], "run": {"training": {"gpus": 2}, "cache_dir": "/data"}}
    asked = form.read(SweepConfig, nested)
    assert asked == SweepConfig.model_validate(nested)
    filled = {"seeds": [0, 1], "training": {"gpus": 2}, "cache_dir": "/data"}
    assert form.filled(asked) == filled
    accepted(sweep, "sweep", filled)


def test_folded_groups_and_empty_fields_give_nothing():
    folded = dict.fromkeys(("model", "data", "tokenizer", "training", "other"))
    accepted(pretrain, "run", folded)
    assert form.read(RunConfig, folded) == RunConfig()
    assert form.read(RunConfig, {"other": {"seed": None}}).model_fields_set == set()


def test_every_default_is_left_to_the_run():
    assert not any("default" in field for field in all_fields(pretrain).values())
    assert "default" not in pretrain.parameters.properties["run"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 0}, "'run.max_steps'. Failure reason: 0 is less than the minimum of 1"),
        ({"other": {"seed": -1}}, "'run.other.seed'. Failure reason: -1 is less than"),
        (
            {"training": {"z_loss": "x"}},
            "'run.training.z_loss'. Failure reason: 'x' is not of type",
        ),
        ({"size": "huge"}, "'run.size'. Failure reason: 'huge' is not one of"),
        ({"run_name": "a b"}, "'run.run_name'"),
    ],
)
def test_form_refuses_a_value_out_of_bounds_by_its_name(values: dict[str, Any], words: str):
    with pytest.raises(NotOfTheForm, match=words):
        accepted(pretrain, "run", values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_step": 5}, "--max-step: there is no such setting"),
        ({"training": {"what": 5}}, "--what: there is no such setting"),
        ({"size": "tiny", "model": {"hidden_size": 8}}, "size tiny and a custom shape"),
        ([], "must be a group of named values"),
    ],
)
def test_contradictions_that_a_form_allows_are_refused_when_it_is_read(values: Any, words: str):
    with pytest.raises(ValidationError) as refused:
        form.read(RunConfig, values)
    assert words in error_message(refused.value)


def test_proof_has_no_form_and_takes_its_settings_nested():
    nested = {"proof": {"kills": 2}, "run": {"training": {"max_steps": 5}}}
    assert form.read(ProofRun, nested) == ProofRun.model_validate(nested)
    assert [*prove_resume.parameters.properties] == ["asked"]


def test_no_two_settings_share_a_name():
    names = [name.rpartition(".")[2] for name, _ in leaves(RunConfig())]
    assert len(set(names)) == len(names), "a form finds a setting by its own name"

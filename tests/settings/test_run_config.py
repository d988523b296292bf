"""Requested settings, before they are settled."""

import math

import pytest
from pydantic import ValidationError
from tiny import SHAPE

from zeroflow.model.sizes import SIZES
from zeroflow.settings.run_config import ModelChoice, RunConfig, TrainingChoice, leaves


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-flag", "x" * 101, "a b"])
def test_name_that_is_not_a_plain_folder_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^run_name: "):
        RunConfig(run_name=name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"seq_len": 1}}, "training.seq_len: must be at least 2 (found 1)"),
        ({"training": {"seq_len": "x", "gpus": 0}}, None),
        ({"seed": "a"}, "seed: must be a whole number (found 'a')"),
        (
            {"learning_rate": 0.1},
            "learning_rate: there is no such setting (found 0.1): set it in the group training",
        ),
        ({"model": {"layers": 3}}, "model.layers: there is no such setting (found 3)"),
        ({"data": {"data_mode": "files"}}, "--data-mode files needs --data-path: name files or gl"),
    ],
)
def test_message_about_settings_in_python_names_them_by_their_path(given, message):
    with pytest.raises(ValueError) as error:
        RunConfig(**given)
    assert not isinstance(error.value, ValidationError)
    lines = sorted(str(error.value).splitlines())
    assert len(lines) == (1 if message else 2)
    assert lines[-1].startswith(message or "training.seq_len: must be a whole number (found 'x')")
    with pytest.raises(ValidationError):
        RunConfig.model_validate(given)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize(
    ("group", "setting"),
    [("training", "learning_rate"), ("training", "z_loss"), ("optimizer", "weight_decay")],
)
def test_number_that_is_not_finite_is_refused(group, setting, value):
    with pytest.raises(ValidationError, match=setting):
        RunConfig.model_validate({group: {setting: value}})


def test_custom_shape_must_be_complete():
    choice = ModelChoice(**SHAPE.model_dump())
    assert choice.shape == SHAPE and choice.name == "custom"
    assert ModelChoice().shape == SIZES["tiny"] and ModelChoice().name == "tiny"
    assert ModelChoice(size="medium").shape == SIZES["medium"]
    with pytest.raises(ValidationError, match="needs --num-key-value-heads, --intermediate-size"):
        ModelChoice(**SHAPE.model_dump(exclude={"num_key_value_heads", "intermediate_size"}))
    with pytest.raises(ValidationError, match="size tiny and a custom shape"):
        ModelChoice(size="tiny", hidden_size=32)
    with pytest.raises(ValidationError, match="cannot be divided among 5 query heads"):
        ModelChoice(**SHAPE.model_dump() | {"num_attention_heads": 5})


def test_synthetic_data_with_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="needs no tokenizer: drop --tokenizer-name"):
        RunConfig(data={"data_mode": "synthetic"}, tokenizer={"tokenizer_name": "train"})


def test_every_setting_has_its_own_name_and_description():
    names = [name.rsplit(".", 1)[-1] for name, _ in leaves(RunConfig())]
    assert len(set(names)) == len(names)
    for group in (TrainingChoice, ModelChoice):
        for name, field in group.model_fields.items():
            assert field.description, name

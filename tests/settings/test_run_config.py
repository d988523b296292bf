"""Requested settings, before they are settled."""

import math

import pytest
from pydantic import ValidationError
from tiny import SHAPE

from zeroflow.model.sizes import SIZES
from zeroflow.settings.run_config import ModelChoice, RunConfig, TrainingChoice, leaves


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-flag", "x" * 101, "a b"])
def test_name_that_is_not_a_plain_folder_name_is_refused(name):
    with pytest.raises(ValidationError, match="run_name"):
        RunConfig(run_name=name)


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
    with pytest.raises(ValidationError, match="needs no tokenizer: drop --tokenizer-name"):
        RunConfig(data={"data_mode": "synthetic"}, tokenizer={"tokenizer_name": "train"})


def test_every_setting_has_its_own_name_and_description():
    names = [name.rsplit(".", 1)[-1] for name, _ in leaves(RunConfig())]
    assert len(set(names)) == len(names)
    for group in (TrainingChoice, ModelChoice):
        for name, field in group.model_fields.items():
            assert field.description, name

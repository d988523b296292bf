"""Settings by the names of their flags."""

import pytest
from pydantic import ValidationError

from zeroflow.settings.flags import error_message
from zeroflow.settings.run_config import RunConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"batch_size": "0"}}, "--batch-size: .* greater than 0 .found '0'"),
        ({"training": {"seq_len": 1}}, "--seq-len: .* greater than or equal to 2"),
        ({"run_name": "a/b"}, "--run-name: .*'a/b'"),
        ({"data": {"data_path": ["a", 3]}}, "^--data-path: .* .found 3"),
        ({"model": {"hidden_size": 32}}, "^a custom shape also needs num_hidden_layers"),
        ({"data": {"data_mode": "files"}}, "^data_mode files needs data_path"),
    ],
)
def test_message_is_in_the_words_of_the_command_line(given, message):
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(given)
    said = error_message(refused.value)
    assert said.count("\n") == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_message_about_a_long_value_is_short():
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"training": {"seq_len": ["x" * 100] * 1000}})
    assert len(error_message(refused.value)) < 400


def test_message_of_another_error_is_its_message_or_at_least_its_kind():
    assert error_message(ValueError("no room")) == "no room"
    assert error_message(ValueError("ws://me:s3cret@box")) == "ws://***@box"
    assert error_message(TimeoutError()) == "TimeoutError"

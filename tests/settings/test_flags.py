"""Settings by the names of their flags."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import ROOT
from pydantic import BaseModel, ValidationError

from zeroflow.config import in_words
from zeroflow.orchestration.ui import UiConfig
from zeroflow.settings import flags
from zeroflow.settings.flags import error_message
from zeroflow.settings.proof import ProofRun
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.sweep import SweepConfig
from zeroflow.settings.zero_lab import ZeroLabRun
from zeroflow.training.sampling import SamplingConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"batch_size": "0"}}, "--batch-size: must be greater than 0 .found '0'"),
        ({"training": {"seq_len": 1}}, "--seq-len: must be at least 2 .found 1"),
        ({"training": {"seq_len": "x"}}, "--seq-len: must be a whole number .found 'x'"),
        ({"training": {"seq_len": 1.5}}, "--seq-len: must be a whole number .found 1.5"),
        ({"training": {"fp8": "maybe"}}, "--fp8: must be true or false .found 'maybe'"),
        ({"training": {"validation_fraction": 2}}, "--validation-fraction: must be less than 1 .f"),
        ({"training": {"learning_rat": 1}}, "--learning-rat: there is no such setting"),
        ({"model": {"size": "huge"}}, "--size: must be 'tiny', 'small' or 'medium' .found 'huge'"),
        ({"model": 3}, "--model: must be a group of named values .found 3"),
        (
            {"run_name": "../../x"},
            "--run-name: a name may contain only letters, .* .found '../../x'",
        ),
        ({"data": {"data_path": ["a", 3]}}, "^--data-path: .* .found 3"),
        ({"model": {"hidden_size": 32}}, "^a custom shape also needs --num-hidden-layers"),
        ({"data": {"data_mode": "files"}}, "^--data-mode files needs --data-path"),
    ],
)
def test_message_names_settings_by_their_flags(given, message):
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(given)
    said = error_message(refused.value)
    assert said.count("\n") == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


CONFIGS = [RunConfig, SweepConfig, ProofRun, ZeroLabRun, UiConfig, SamplingConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_help_names_settings_by_their_flags(config):
    names = {setting.path[-1] for setting in flags.settings(config)}
    for setting in flags.settings(config):
        words = re.findall(r"(?<!-)\b[a-z]+(?:_[a-z]+)+\b", flags.help_text(setting.field))
        assert not names & {*words}, setting.flag


def constraints(config: type[BaseModel]) -> Iterator[dict[str, Any]]:
    """The errors that values of several types cause in each setting of `config`."""
    for setting in flags.settings(config):
        for value in ("", "?", "x" * 999, -1, 10**40, 1.5, [], {}, [{}], b"", None, object()):
            given: dict[str, Any] = {setting.path[-1]: value}
            for group in reversed(setting.path[:-1]):
                given = {group: given}
            try:
                config.model_validate(given)
            except ValidationError as refused:
                yield from refused.errors()


@pytest.mark.parametrize("config", [RunConfig, SweepConfig, ProofRun, UiConfig, SamplingConfig])
def test_no_message_is_in_the_words_of_pydantic(config):
    found = {problem["type"]: in_words(problem) for problem in constraints(config)}
    found.pop("value_error", None)  # ours
    raw = {kind: text for kind, text in found.items() if re.search("should|valid|unable", text)}
    assert not raw


def test_message_about_a_long_value_is_short():
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate({"training": {"seq_len": ["x" * 100] * 1000}})
    assert len(error_message(refused.value)) < 400


def test_message_of_another_error_is_its_text_or_its_type():
    assert error_message(ValueError("no room")) == "no room"
    assert error_message(ValueError("ws://me:s3cret@box")) == "ws://***@box"
    assert error_message(TimeoutError()) == "TimeoutError"


NAMES = {
    setting.path[-1]
    for config in (RunConfig, SweepConfig, ProofRun, ZeroLabRun)
    for setting in flags.settings(config)
    if "_" in setting.path[-1]
}


def messages(file: Path) -> Iterator[str]:
    """Texts of the errors that `file` raises, and of its lines in the log."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Raise) and node.exc:
            parts = [node.exc]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parts = [*node.args] if node.func.attr in LOGGING else []
        for part in parts:
            yield from (
                text.value
                for text in ast.walk(part)
                if isinstance(text, ast.Constant) and isinstance(text.value, str)
            )


LOGGING = {"info", "warning", "error", "add_note"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "zeroflow").rglob("*.py")), ids=lambda file: file.stem
)
def test_messages_name_a_setting_by_its_flag(file):
    named = re.compile(rf"(?<![\w.])({'|'.join(sorted(NAMES))})(?!\w)")
    assert not [text for text in messages(file) if named.search(text)]

"""Wrong settings of Prefect, which fail when it is imported."""

import os
import subprocess
import sys
import tomllib

import pytest

from zeroflow.cli.prefect_settings import importing_prefect

COMMAND = "from zeroflow.cli.flow import main; main('pretrain', ['--cache-dir=cache'])"


def test_wrong_level_of_logging_ends_a_command_in_one_line_with_its_place(tmp_path):
    variables = {"PREFECT_HOME": str(tmp_path), "PREFECT_LOGGING_LEVEL": "banana"}
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env=os.environ | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    [said] = ended.stderr.splitlines()  # and nothing of Prefect before it
    assert said.startswith("error: Prefect's settings are wrong: level of LoggingSettings: ")
    assert "(found 'BANANA')" in said and f"{tmp_path}/profiles.toml: correct them" in said


def test_profiles_that_are_not_toml_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    problem = rf"a file is not TOML.*{tmp_path}/profiles\.toml: correct them there"
    with pytest.raises(ValueError, match=problem), importing_prefect():
        tomllib.loads('active = "x')  # as Prefect does

"""Wrong settings of Prefect, which fail when it is imported."""

import os
import subprocess
import sys
import tomllib

import pytest
from pydantic import create_model

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


def test_folder_that_cannot_be_created_ends_a_command_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "x"
    given = os.environ | {"PREFECT_HOME": str(home)}
    given.pop("PREFECT_API_URL", None)
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND], env=given, cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 2
    [said] = ended.stderr.splitlines()
    assert said.startswith(f"error: cannot create Prefect's folder {home} (Not a directory): set")


def test_new_folder_of_prefect_is_private_and_secret_values_are_not_shown(tmp_path, monkeypatch):
    home = tmp_path / "home"
    monkeypatch.setenv("PREFECT_HOME", str(home))
    secrets = {"key": ["s3cret"], "auth_string": "s3cret"}
    with (
        pytest.raises(ValueError, match="wrong: auth_string of Secret") as error,
        importing_prefect(),
    ):
        create_model("Secret", key=(list, ...), auth_string=(int, ...)).model_validate(secrets)
    assert home.stat().st_mode & 0o077 == 0 and "s3cret" not in str(error.value)


def test_profiles_that_are_not_toml_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    problem = rf"a file is not TOML.*{tmp_path}/profiles\.toml: correct them there"
    with pytest.raises(ValueError, match=problem), importing_prefect():
        tomllib.loads('active = "x')  # as Prefect does

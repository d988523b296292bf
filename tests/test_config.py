import pytest
from pydantic import PositiveInt, ValidationError

from zeroflow.config import Config, described


class Settings(Config):
    rows: PositiveInt = 3
    """Rows of something."""

    name: str = "a"


def test_unknown_names_and_wrong_values_are_refused():
    with pytest.raises(ValidationError, match="row\n"):
        Settings(row=3)
    with pytest.raises(ValidationError, match="rows"):
        Settings(rows=0)


def test_wrong_default_is_refused_like_a_wrong_value():
    class Wrong(Config):
        rows: PositiveInt = 0

    with pytest.raises(ValidationError, match="rows"):
        Wrong()


def test_settings_never_change():
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.rows = 4


def test_replacing_checks_the_new_value_and_leaves_the_old_settings():
    settings = Settings(name="b")
    assert settings.replace(rows=4) == Settings(rows=4, name="b")
    assert settings.rows == 3
    with pytest.raises(ValidationError, match="rows"):
        settings.replace(rows=-1)
    with pytest.raises(ValidationError, match="row\n"):
        settings.replace(row=1)


def test_docstring_under_a_field_describes_it():
    assert described(Settings)["rows"].description == "Rows of something."
    shown = Settings.model_json_schema()["properties"]
    assert shown["rows"]["description"] == "Rows of something."


def test_inherited_fields_keep_their_docstrings_until_they_are_defined_again():
    class Inner(Settings):
        name: str = "inner"
        """Name of the inner settings."""

        rows: int = 5

    found = described(Inner)
    assert found["name"].description == "Name of the inner settings."
    assert found["rows"].description is None

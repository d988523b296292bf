"""Explanation of wrong Prefect settings, which Prefect reads when it is imported."""

import io
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from pydantic import ValidationError

from zeroflow.text.markup import shortened

_LONGEST = 100
"""Maximum number of characters of a value in an error message."""


@contextmanager
def importing_prefect() -> Iterator[None]:
    """Explain wrong settings that an import of Prefect in the block finds.

    Raises:
        ValueError: Prefect's settings are wrong.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # Prefect prints pages about an error that is explained below
            from zeroflow.orchestration import access

            access.read_settings()
        sys.stderr.write(said.getvalue())
        yield
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
        profiles = os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")
        raise ValueError(
            f"Prefect's settings are wrong: {_problem(error)}. They come from variables that begin "
            f"with PREFECT_ and from {profiles}: correct them there"
        ) from error


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"a file is not TOML ({error})"
    [first, *_] = error.errors()  # one wrong value causes several errors
    name, found = ".".join(map(str, first["loc"])), shortened(repr(first["input"]), _LONGEST)
    return f"{name} of {error.title}: {first['msg']} (found {found})"

"""Explanation of wrong Prefect settings, which Prefect reads when it is imported."""

import io
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from pydantic import ValidationError

from zeroflow.config import in_words
from zeroflow.text.markup import shortened

_SECRET = re.compile(r"key|auth|password|secret|token|url|headers", re.IGNORECASE)
"""Matches the name of a setting whose value may be secret and is not shown."""

_LONGEST = 100
"""Maximum number of characters of a value in an error message."""


@contextmanager
def importing_prefect() -> Iterator[None]:
    """Explain wrong settings that an import of Prefect in the block finds.

    Raises:
        ValueError: Prefect's settings are wrong, or its folder cannot be created.
    """
    said = io.StringIO()
    home = make_home_private()
    try:
        with redirect_stderr(said):  # Prefect prints pages about an error that is explained below
            from zeroflow.orchestration import access

            access.read_settings()
        sys.stderr.write(said.getvalue())
        yield
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        profiles = os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")
        raise ValueError(
            f"Prefect's settings are wrong: {_problem(error)}. They come from variables that begin "
            f"with PREFECT_ and from {profiles}: correct them there"
        ) from error


def make_home_private() -> Path:
    """Create Prefect's folder, readable only by this user: its files may contain secrets.

    Raises:
        ValueError: the folder cannot be created.
    """
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect").expanduser()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if "PREFECT_API_URL" in os.environ:  # another server is used, so the folder is not needed
            return home
        raise ValueError(
            f"cannot create Prefect's folder {home} ({error.strerror}): set PREFECT_HOME to a "
            "writable folder"
        ) from error
    return home


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"a file is not TOML ({error})"
    [first, *_] = error.errors()  # one wrong value causes several errors
    name, found, why = ".".join(map(str, first["loc"])), first["input"], in_words(first)
    if _SECRET.search(name) or not isinstance(found, str | int | float):
        return f"{name} of {error.title}: {why}"
    return f"{name} of {error.title}: {why} (found {shortened(repr(found), _LONGEST)})"

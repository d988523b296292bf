"""Versions of the code that trains: packages, and the commit of zeroflow."""

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from platform import python_version

_PACKAGES = ("zeroflow", "torch", "tokenizers", "pyarrow", "numpy")

_GIT_SECONDS = 10
"""Timeout of git, which may wait for a slow network file system."""


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that affects the numbers of a run."""
    found = {"python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # from a source tree that is not installed
            continue
    return found


@cache
def git_commit() -> str | None:
    """Return the commit of this package, with "+changes" if files have changed since; None if
    unknown.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # another repository may be further up
        return _installed_commit()
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        done = subprocess.run(
            command, cwd=checkout, capture_output=True, check=True, text=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):  # git is missing, or does not trust the folder
        return None
    return done.stdout.strip() or None


def _installed_commit() -> str | None:
    """Return the commit from which pip installed the package."""
    try:
        recorded = distribution("zeroflow").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    found = json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id")
    return str(found) if found else None

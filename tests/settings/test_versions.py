import subprocess
from pathlib import Path

import torch

from zeroflow.settings import versions


def test_versions_are_the_installed_ones():
    found = versions.versions()
    assert found["torch"] == torch.__version__
    assert {"python", "zeroflow", "numpy"} <= set(found)


def test_commit_is_that_of_the_checkout_and_of_no_other_repository(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *settings, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit_of(checkout: Path) -> str | None:
        place = checkout / "zeroflow" / "settings" / "versions.py"
        monkeypatch.setattr(versions, "__file__", str(place))
        versions.git_commit.cache_clear()
        return versions.git_commit()

    git("init", "--quiet")
    code = tmp_path / "zeroflow" / "settings" / "versions.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    assert commit_of(tmp_path) is None, "nothing is committed"
    git("add", ".")
    git("commit", "--quiet", "--message=code")
    head = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == head
    code.write_text("changed")
    assert commit_of(tmp_path) == f"{head}+changes"
    assert commit_of(tmp_path / ".venv" / "site-packages") != head, "which is in a repository"
    monkeypatch.undo()
    versions.git_commit.cache_clear()

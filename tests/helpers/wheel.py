"""The package as a wheel in a separate environment."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from pipeline import ROOT


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of its sources, because a build leaves files behind."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zeroflow", source / "zeroflow", ignore=unwanted)
    _run(
        sys.executable, *_PIP, "wheel", "--no-build-isolation", f"-w{folder}", str(source), *_PLAIN
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """Install `wheel` in a new environment at `folder`, which also sees the packages of this one.

    Returns:
        The folder of its programs.
    """
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    python = str(programs / "python")
    _run(sys.executable, *_PIP, f"--python={python}", "install", str(wheel), *_PLAIN)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A folder in a .pth file provides its packages, but its own .pth files are not read. They would
    # add the package of the working tree
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return programs


_PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")

_PLAIN = ("--no-deps", "--no-index")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""`constraints.txt`: requirements of package, tests and Dask, in versions that ran together."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pipeline import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDED = [
    Requirement(text)
    for text in (*PROJECT["dependencies"], *EXTRAS["dask"], *EXTRAS["dev"])
    if not text.startswith("zeroflow")
]
PINS = {
    canonicalize_name(pin.name): pin.specifier
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if (text := line.partition("#")[0].strip())
    for pin in [Requirement(text)]
}

COME_ALONG = {
    "triton",  # with PyTorch's builds for GPUs, in the version that each of them needs
    "pydantic_core",  # with Pydantic, which pins it
    "_typeshed",  # with mypy
    "httpx",  # with Prefect, whose client it is
    "uvicorn",  # with Prefect, whose server it runs
    "apprise",  # with Prefect, whose notifications it sends
    "gguf",  # of zeroflow[gguf], which pins it
    "lm_eval",  # of zeroflow[eval], which pins it
    "tensorboard",  # of zeroflow[tensorboard]
    "wandb",  # of zeroflow[wandb]
    "flash_attn",  # of zeroflow[hopper], whose requirements are versions that ran together
    "quack",
}


@pytest.mark.parametrize("needed", NEEDED, ids=lambda needed: needed.name)
def test_requirement_is_pinned_to_a_version_that_it_allows(needed):
    [pin] = PINS[canonicalize_name(needed.name)]
    assert pin.operator == "==" and pin.version in needed.specifier


def test_every_module_that_is_imported_comes_from_a_package_that_is_pinned():
    folders = ("zeroflow", "flows", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    own = {*folders, *(file.stem for file in files)}
    for folder in ("benchmarks", "docs"):  # on the path of the tests
        own |= {file.stem for file in (ROOT / folder).glob("*.py")}
    modules = {name for file in files for name in imported(file)} - own - COME_ALONG
    providers = packages_distributions()
    found = {module: providers[module] for module in modules - set(sys.stdlib_module_names)}
    assert not {
        module: names
        for module, names in found.items()
        if not PINS.keys() & set(map(canonicalize_name, names))
    }


def imported(file) -> set[str]:
    """The packages that `file` imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names

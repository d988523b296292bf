import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zeroflow

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "zeroflow").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])

NEED_A_GPU = {"loss_kernel.py", "fp8_kernels.py"}
"""Import Triton, which comes with PyTorch's builds for GPUs only."""

NEED_AN_EXTRA = {"harness_model.py"}
"""Import lm-evaluation-harness, for the classes that they derive from."""

RUN_BY_MLFLOW = {"text_model.py"}
"""Programs that MLflow executes, for the class that they derive from."""

DECORATE = {"orchestration/flows.py", "orchestration/stages.py", "orchestration/view.py"}
"""Make Prefect's flows and tasks, and Prefect sets up its logging as it makes one."""

# A unit may import those in the lines above its own, and itself
LAYERS = [
    {"text"},
    {"config", "artifacts", "units"},
    {"records"},
    {"device", "reuse", "run_folder"},
    {"model", "data"},
    {"tracking"},
    {"training"},
    {"estimate"},
    {"checks"},
    {"lab"},
    {"settings"},
    {"inference"},
    {"report"},
    {"launchers"},
    {"stages"},
    {"pipeline"},
    {"api"},
    {"orchestration"},
    {"cli"},
    {"flows"},
]
HEIGHT = {unit: height for height, layer in enumerate(LAYERS) for unit in layer}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def unit(module: str) -> str:
    """zeroflow.data.corpus -> data; flows.pretrain -> flows"""
    parts = module.split(".")
    return parts[1] if parts[0] == "zeroflow" and len(parts) > 1 else parts[0]


def imported(file: Path) -> Iterator[str]:
    """Every module that `file` imports, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(file)} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed"


def importers(*modules: str) -> set[str]:
    """Files that import one of `modules` or something in it."""
    return {
        name(file)
        for file in FILES
        for found in imported(file)
        if any(f"{found}.".startswith(f"{module}.") for module in modules)
    }


def test_there_are_modules_to_check():
    assert len(FILES) > 30
    assert "zeroflow/training/loop.py" in importers("torch")


def test_prefect_is_imported_only_in_flows_and_orchestration():
    assert all(
        file.startswith(("flows/", "zeroflow/orchestration/")) for file in importers("prefect")
    )


def test_mlflow_is_imported_only_in_tracking():
    assert all(file.startswith("zeroflow/tracking/") for file in importers("mlflow"))


def test_torch_distributed_is_imported_only_for_agents_checkpoints_sharding_and_links():
    names = ("training/agent", "training/older_checkpoints", "training/zero", "lab/links")
    allowed = {f"zeroflow/{name}.py" for name in names}
    assert importers("torch.distributed") <= allowed


def test_data_is_built_without_torch():
    data = {name(file) for file in FILES if name(file).startswith("zeroflow/data/")}
    assert importers("torch") & data == {"zeroflow/data/batches.py"}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_one_way(file):
    module = name(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if module == "zeroflow":
        return  # its public names are imported at first use
    assert unit(module) in HEIGHT, f"say in LAYERS where {unit(module)} belongs"
    for found in imported(file):
        if found.split(".")[0] not in ("zeroflow", "flows"):
            continue
        if unit(found) != unit(module):
            assert HEIGHT[unit(found)] < HEIGHT[unit(module)], f"{module} imports {found}"


def test_package_imports_little_and_its_public_names_at_first_use():
    code = """
import sys, zeroflow
assert not {name for name in sys.modules if name.startswith("zeroflow.")}
public = {name: getattr(zeroflow, name) for name in zeroflow.__all__}
assert public["RunConfig"].__module__ == "zeroflow.settings.run_config"
assert all(value.__doc__ for value in public.values())
assert not {"prefect", "mlflow"} & set(sys.modules), "neither is needed to run the pipeline"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(zeroflow, "nothing")  # noqa: B009, the name is not there


@pytest.mark.parametrize("file", sorted((ROOT / "zeroflow").glob("*/__init__.py")), ids=name)
def test_packages_contain_only_a_docstring(file):
    [docstring] = ast.parse(file.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)


IMPORT_ALL = """
import importlib, json, logging, os, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
logger = logging.getLogger("zeroflow")
inner = [name for name in logging.root.manager.loggerDict if name.startswith("zeroflow.")]
import torch
facts = {
    "handlers": [str(handler) for handler in logging.root.handlers + logger.handlers],
    "inner handlers": [name for name in inner if logging.getLogger(name).handlers],
    "level": logger.level,
    "cuda": torch.cuda.is_initialized(),
    "mlflow": "mlflow" in sys.modules,
    "loggers": len(inner),
}
print(json.dumps(facts))
"""


def test_importing_everything_touches_no_file_logger_or_device(tmp_path):
    modules = [
        name(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in FILES
        if name(file).startswith("zeroflow/")
        and file.name not in NEED_A_GPU | NEED_AN_EXTRA | RUN_BY_MLFLOW
        and name(file).removeprefix("zeroflow/") not in DECORATE
    ]
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PREFECT_", "MLFLOW_", "HF_", "XDG_"))
    }
    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT_ALL, *modules],
        cwd=tmp_path,
        env=kept | {"HOME": str(tmp_path), "DO_NOT_TRACK": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    # Prefect makes its own folder, and leaves it empty
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    facts = json.loads(done.stdout)
    assert facts.pop("loggers") > 10
    assert facts == {
        "handlers": [],
        "inner handlers": [],
        "level": 0,
        "cuda": False,
        "mlflow": False,
    }


def test_name_of_a_public_class_is_defined_once():
    found: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert not {name: places for name, places in found.items() if len(places) > 1}

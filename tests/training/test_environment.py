"""Environment variables that ranks get."""

import py_compile
import subprocess
import sys
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from zeroflow.training import environment as environments
from zeroflow.training.environment import place_environment, rank_environment


def test_compiled_code_is_kept_in_the_cache_unless_the_user_names_a_folder(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    environment = rank_environment(Path("cache/compile"))
    assert environment["TRITON_CACHE_DIR"] == str(Path("cache/compile/triton"))
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert "TRITON_CACHE_DIR" not in rank_environment(None)


def test_bytecode_is_kept_in_the_cache_if_the_interpreter_writes_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    source = tmp_path / "torch.py"
    source.write_text("")
    monkeypatch.setattr(
        environments, "find_spec", partial(PathFinder.find_spec, path=[str(tmp_path)])
    )
    environment = rank_environment(tmp_path / "compile")
    command = [sys.executable, "-c", "import torch"]
    environment["PYTHONPATH"] = str(tmp_path)
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert list((tmp_path / "compile" / "python").rglob("torch.*.pyc"))

    py_compile.compile(str(source))
    environment = rank_environment(tmp_path / "compile")
    assert "PYTHONPYCACHEPREFIX" not in environment
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


def test_single_rank_is_rank_0_under_any_launcher_of_the_flow(monkeypatch):
    given = {"RANK": "3", "WORLD_SIZE": "4"}
    for name, number in given.items():
        monkeypatch.setenv(name, number)
    environment = rank_environment(None) | place_environment(0, 1)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, ["0", "1"]), ("5,3", ["5", "3"]), ("GPU-a, GPU-b,GPU-c", ["GPU-a", "GPU-b"])],
)
def test_each_rank_sees_one_of_the_gpus_that_the_user_makes_visible(visible, seen, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    given = [place_environment(rank, 2) for rank in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in given] == seen

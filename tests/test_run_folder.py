import ast
from pathlib import Path

import pytest

from zeroflow.run_folder import Cache, RunFolder

ROOT = Path(__file__).parents[1] / "zeroflow"

NAMES = {
    "run.json",
    "asked.json",
    "model.json",
    "job.json",
    "training.json",
    "overfit.json",
    "overfit-job.json",
    "preflight.json",
    "preflight-job.json",
    "preflight-checkpoint",
    "metrics.jsonl",
    "events.jsonl",
    "ledger.jsonl",
    "goodput.jsonl",
    "plans.jsonl",
    "report.json",
    "report.md",
    "data.md",
    "proof.json",
    "proof.md",
    "mlflow.json",
    "sweep.json",
    "group.json",
    "comparison.json",
    "comparison.md",
    "loss.png",
    "time.png",
    "overfit.png",
    "lengths.png",
    "proof.png",
}


def test_file_names_are_defined_in_one_module():
    spelled = {str(file.relative_to(ROOT)): texts(file) & NAMES for file in ROOT.rglob("*.py")}
    assert spelled.pop("run_folder.py") == NAMES
    assert not {file: names for file, names in spelled.items() if names}


def texts(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def test_run_is_found_from_its_cache_and_its_cache_from_the_run(tmp_path):
    cache = Cache(tmp_path)
    for name in ("b", "a"):
        cache.run(name).path.mkdir(parents=True)
    (cache.runs / ".a.lock").touch()
    runs = list(cache.existing_runs())
    assert [run.name for run in runs] == ["a", "b"]
    assert runs[0] == RunFolder(tmp_path / "runs" / "a") and runs[0].cache == cache
    assert cache.run("a").metrics == tmp_path / "runs" / "a" / "metrics.jsonl"


@pytest.mark.parametrize("name", ["../runs/a", "/a", "a/b", "..", ".hidden", "", "a\n"])
def test_path_is_not_the_name_of_a_run_or_sweep(tmp_path, name):
    for find in (Cache(tmp_path).run, Cache(tmp_path).sweep):
        with pytest.raises(ValueError, match=r"cannot be the name of a (run|sweep): a name may"):
            find(name)

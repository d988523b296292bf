import gc
import json
import subprocess
import sys

from zeroflow.training import interpreter
from zeroflow.training.interpreter import without_collections


def test_imports_are_neither_interrupted_by_collections_nor_collected():
    was = gc.isenabled()
    before = gc.get_freeze_count()
    try:
        gc.enable()
        with without_collections():
            assert not gc.isenabled()
            kept = [[number] for number in range(100)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
        gc.disable()
        with without_collections():
            pass
        assert not gc.isenabled(), "as before"
    finally:
        gc.unfreeze()
        (gc.enable if was else gc.disable)()


def test_module_runs_with_its_own_arguments(tmp_path):
    file = tmp_path / "numbers.json"
    file.write_text("[1,2]")
    command = [sys.executable, "-m", interpreter.__name__, "json.tool", "--compact", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1, 2]
    assert done.stdout.strip() == "[1,2]", "the flag is that of the module"

import gc
import json
import resource
import subprocess
import sys

from zeroflow.training import interpreter
from zeroflow.training.interpreter import with_room, without_collections

DEPTHS, CALLS = 300, 200


def leaf():
    return None


def call_often(depth):
    """Call `leaf` in a loop, `depth` calls deeper."""
    if depth:
        call_often(depth - 1)
        return
    for _ in range(CALLS):
        leaf()


def pages_touched_first():
    """Number of pages that the kernel had to map for calls at many depths."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for depth in range(DEPTHS):
        call_often(depth)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_calls_at_every_depth_stay_in_one_chunk_of_frames():
    # 300 frames fill about 30 KB, 8 pages. A loop at the end of a chunk would touch a new page in
    # each of its 200 calls
    assert with_room(pages_touched_first) < CALLS


def test_result_of_the_function_is_returned():
    assert with_room(lambda: 3) == 3


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

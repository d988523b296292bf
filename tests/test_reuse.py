import os

from zeroflow import reuse

WANTED = {"seq_len": 64, "packing": "concat", "seed": None, "file": {"a.txt": "1f", "b.txt": "2e"}}


def test_result_with_the_fewest_differences_is_named_with_both_values():
    there = {
        "far": WANTED | {"seq_len": 32, "packing": "best-fit"},
        "near": WANTED | {"seq_len": 128},
        "as near": WANTED | {"seq_len": 256},
        "old": None,
    }
    told = "the most similar of 4, near, has seq_len 128 instead of 64"
    assert reuse.nearest(WANTED, there) == told


def test_files_are_one_field_and_those_that_changed_are_named():
    files = {"a.txt": "3d", "b.txt": "2e", "c.txt": "4c"}
    there = {"files": WANTED | {"file": files}, "settings": WANTED | {"seed": 1, "packing": "x"}}
    told = "has file a.txt 3d instead of 1f, file c.txt 4c instead of none"
    assert reuse.nearest(WANTED, there) == f"the most similar of 2, files, {told}"
    without = {"packing": "concat", "seq_len": 64}
    assert reuse.changes(WANTED, without) == "has file none instead of 2 entries"
    assert reuse.changes(without, WANTED) == "has file 2 entries instead of none"


def test_results_for_other_text_are_not_compared():
    wanted = WANTED | {"source": "files"}
    other = wanted | {"file": {"n0000.txt": "1f"}, "seed": 1}
    told = "none exists yet for this text"
    assert reuse.nearest(wanted, {"other": other, "sample": wanted | {"source": "sample"}}) == told
    changed = wanted | {"file": {"b.txt": "9a", "c.txt": "2e"}, "seed": 2, "packing": "x"}
    told = reuse.nearest(wanted, {"other": other, "changed": changed})
    assert told.startswith("the most similar of 2, changed, has ")


def test_many_differences_are_counted_and_long_values_cut():
    wanted, found = ({f"field{n}": value for n in range(9)} for value in ("a" * 99, "b"))
    told = reuse.changes(wanted, found)
    assert told.count("instead of") == 4 and told.endswith(", 5 more differences")
    assert reuse.changes({f"field{n}": n for n in range(5)}, {}).endswith(", 1 more difference")
    one = reuse.changes({"file": {"a.txt": "1f"}}, {})
    assert one == "has file none instead of 1 entry"
    assert f"field0 b instead of {'a' * 47}..." in told


def test_no_result_and_no_record_are_distinguished():
    assert reuse.nearest(WANTED, {}) == reuse.NOTHING
    unknown = reuse.nearest(WANTED, dict.fromkeys(["a", "b", "c", "d", "e"]))
    assert unknown.startswith("the settings of a, b, c and 2 more are unknown")


def test_folders_are_read_newest_first_without_what_is_damaged_or_half_made(tmp_path):
    names = ["old", "new", "mine", ".half.partial", "old.damaged-1", "unreadable"]
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "file").write_text("")

    def read(path):
        if path.name == "unreadable":
            raise KeyError(path)
        return {"name": path.name}

    found = reuse.existing(tmp_path, read, but=tmp_path / "mine")
    assert list(found.items()) == [
        ("unreadable", None),
        ("new", {"name": "new"}),
        ("old", {"name": "old"}),
    ]
    assert reuse.existing(tmp_path / "nowhere", read, but=tmp_path / "mine") == {}

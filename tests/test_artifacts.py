import errno
import logging
import os
import random
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import contents

from zeroflow import artifacts
from zeroflow.artifacts import DamagedArtifact

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def write_files(folder):
    (folder / "inner").mkdir()
    (folder / "a.bin").write_bytes(random.Random(0).randbytes(500))
    (folder / "inner" / "b.txt").write_text("some text")
    (folder / "empty").write_bytes(b"")
    artifacts.seal(folder, {"made": "here"})


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def flip_a_bit(file, position):
    content = bytearray(file.read_bytes())
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)


@given(JSON)
def test_fingerprint_does_not_depend_on_the_order_of_keys(identity):
    assert artifacts.fingerprint(reversed_keys(identity)) == artifacts.fingerprint(identity)


def test_fingerprint_differs_for_different_values_and_never_changes():
    things = [{}, [], None, 0, "0", {"a": 1}, {"a": "1"}, {"b": 1}, [1, 2], [2, 1], "é", "e\u0301"]
    assert len({artifacts.fingerprint(thing) for thing in things}) == len(things)
    assert artifacts.fingerprint({"a": 1}) == "f9d86028c6e0"  # sha256 of '{"a": 1}'


def test_sealed_directory_verifies_and_returns_its_facts(tmp_path):
    write_files(tmp_path)
    manifest = artifacts.verify(tmp_path)
    assert manifest["made"] == "here"
    assert sorted(manifest["files"]) == ["a.bin", "empty", "inner/b.txt"]
    assert manifest["files"]["inner/b.txt"]["bytes"] == 9


def test_any_flipped_bit_is_noticed(tmp_path):
    write_files(tmp_path)
    rng = random.Random(0)
    for _ in range(60):
        file = tmp_path / rng.choice(["a.bin", "inner/b.txt"])
        position = rng.randrange(8 * file.stat().st_size)
        flip_a_bit(file, position)
        with pytest.raises(DamagedArtifact, match=f"{file.name} was changed: its sha256 differs"):
            artifacts.verify(tmp_path)
        flip_a_bit(file, position)
    artifacts.verify(tmp_path)


def test_any_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    write_files(tmp_path)
    manifest = tmp_path / "manifest.json"
    for position in random.Random(0).sample(range(8 * manifest.stat().st_size), 100):
        flip_a_bit(manifest, position)
        with pytest.raises(DamagedArtifact, match=r"no readable manifest\.json"):
            artifacts.verify(tmp_path)
        flip_a_bit(manifest, position)
    artifacts.verify(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").unlink(), "a.bin is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"short"), "5 bytes instead of 500"),
        (lambda folder: (folder / "inner" / "c").touch(), "does not list: {'inner/c'}"),
        (lambda folder: (folder / "manifest.json").unlink(), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"fi'), "no readable manifest"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "no readable manifest"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "no readable manifest"),
    ],
)
def test_changed_directory_is_refused(tmp_path, damage, message):
    write_files(tmp_path)
    damage(tmp_path)
    with pytest.raises(DamagedArtifact, match=message):
        artifacts.verify(tmp_path)


def test_builder_is_called_once(tmp_path):
    calls = []

    def build(partial):
        calls.append(partial)
        write_files(partial)

    path = tmp_path / "deep" / "thing"
    assert not artifacts.build_once(path, build)
    made = path.stat().st_mtime_ns
    assert artifacts.build_once(path, build)
    assert len(calls) == 1 and calls[0] != path and not calls[0].exists()
    assert path.stat().st_mtime_ns == made


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_builder_leaves_no_files_and_no_lock(tmp_path, error):
    def fail(partial):
        (partial / "half").write_text("x")
        raise error("on purpose")

    path = tmp_path / "thing"
    with pytest.raises(error, match="on purpose"):
        artifacts.build_once(path, fail)
    assert not [found for found in tmp_path.iterdir() if found.is_dir()]
    assert not artifacts.build_once(path, write_files)
    artifacts.verify(path)


def test_leftovers_of_a_killed_builder_are_not_used(tmp_path):
    partial = artifacts.partial_path(tmp_path / "thing", socket.gethostname())
    partial.mkdir()
    (partial / "left over").write_text("x")
    artifacts.build_once(tmp_path / "thing", write_files)
    assert "left over" not in contents(tmp_path / "thing")
    assert not partial.exists()


def test_machines_without_shared_locks_build_beside_each_other_and_the_first_result_is_kept(
    tmp_path, monkeypatch
):
    path, mine = tmp_path / "thing", socket.gethostname()

    def write_beside_another_machine(partial):
        (partial / "of").write_text("this machine")
        (path.parent / f".{path.name}.lock").unlink()  # a lock that the other does not see
        monkeypatch.setattr(socket, "gethostname", lambda: "another machine")
        assert not artifacts.build_once(path, write_files)
        assert (partial / "of").read_text() == "this machine"
        artifacts.seal(partial, {})

    assert artifacts.build_once(path, write_beside_another_machine), "the other was faster"
    assert "of" not in contents(path)
    assert not artifacts.partial_path(path, mine).exists()


def test_all_damaged_directories_are_kept(tmp_path):
    path = tmp_path / "thing"
    for number in (1, 2):
        artifacts.build_once(path, write_files)
        (path / "a.bin").write_text(f"damage {number}")
    assert not artifacts.build_once(path, write_files)
    for number in (1, 2):
        aside = tmp_path / f"thing.damaged-{number}"
        assert (aside / "a.bin").read_text() == f"damage {number}"
    artifacts.verify(path)


def test_reader_of_json_finds_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "deep" / "facts.json"
    artifacts.write_json(path, {"text": "é"})
    assert artifacts.read_json(path) == {"text": "é"}
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"text": "new", "bad": object()})
    assert artifacts.read_json(path) == {"text": "é"}
    assert list(path.parent.iterdir()) == [path], "nothing is left over"


def test_private_file_is_readable_only_by_its_user_until_the_user_changes_that(tmp_path):
    file = tmp_path / "settings.json"
    artifacts.write_json(file, 1, private=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    artifacts.write_json(file, 2, private=True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640 and artifacts.read_json(file) == 2


def test_lock_has_one_holder_and_others_wait_if_requested(tmp_path, caplog):
    path, order = tmp_path / "thing", []

    def second() -> None:
        with artifacts.exclusive(path, waiting_for="the first"):
            order.append("second")

    with caplog.at_level(logging.INFO), artifacts.exclusive(path, waiting_for=None):
        with pytest.raises(BlockingIOError), artifacts.exclusive(path, waiting_for=None):
            pytest.fail("two hold the lock")
        waiting = threading.Thread(target=second)
        waiting.start()
        while "waiting: the first" not in caplog.messages:
            time.sleep(0.01)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def test_writers_that_share_a_process_id_write_whole_files(tmp_path):
    """As in two containers: here they are threads."""
    path, together = tmp_path / "plan.json", threading.Barrier(8)

    def write(number: int) -> None:
        together.wait()
        for _ in range(40):
            artifacts.write_json(path, [number] * 2000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    content = artifacts.read_json(path)
    assert len(content) == 2000 and len(set(content)) == 1
    assert list(tmp_path.iterdir()) == [path], "nothing is left over"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EMFILE, "ulimit -n"), (errno.EROFS, "--cache-dir"), (errno.EACCES, "permissions")],
)
def test_system_error_says_what_failed_where_and_what_to_change(number, remedy):
    message = artifacts.explained(OSError(number, os.strerror(number), "cache/runs"))
    assert message.startswith(f"{os.strerror(number)}: cache/runs: ") and remedy in message
    assert artifacts.explained(OSError(number, "our own message")) == "our own message"
    assert artifacts.explained(TimeoutError()) == "TimeoutError"


def test_file_that_is_not_json_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"seed": 1, "na')
    with pytest.raises(ValueError, match=r"run.json is not valid JSON \(Unterminated"):
        artifacts.read_json(path)

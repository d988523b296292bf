"""Output of a command, and its exit codes."""

import logging
import os
import signal
import sys
from contextlib import suppress

import pytest

from zeroflow.cli.console import (
    Terminated,
    fail,
    log_to_console,
    require_writable,
    show,
    terminate,
)


def test_failure_is_shown_with_its_notes_and_with_a_traceback_only_if_verbose(
    console, capsys, caplog
):
    error = ValueError("the disk is full")
    error.add_note("retry: the same command")
    assert fail(error, verbose=False) == 1
    assert capsys.readouterr().err == "error: the disk is full\nretry: the same command\n"
    assert not caplog.records
    assert fail(error, verbose=True, code=2) == 2
    [record] = caplog.records
    assert record.exc_info and record.exc_info[1] is error


def test_read_only_folder_is_refused_before_anything_is_done(tmp_path):
    new = tmp_path / "a" / "b"
    require_writable(new)
    assert new.is_dir() and not list(new.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"/file .*--cache-dir"):
        require_writable(tmp_path / "file")


def test_sigterm_ends_like_ctrl_c_with_its_own_exit_code():
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(Terminated) as ended:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


def test_lines_go_to_standard_output_and_details_only_if_verbose(console, capsys):
    log = logging.getLogger("zeroflow.some.module")
    log_to_console(verbose=False)
    log.info("building shards")
    log.debug("a detail")
    assert capsys.readouterr().out.split("  ", 1)[1] == "building shards\n"
    logging.getLogger("zeroflow").handlers.clear()
    log_to_console(verbose=True)
    log.debug("a detail")
    assert "a detail" in capsys.readouterr().out


def test_run_continues_when_the_reader_of_its_output_exits(console, monkeypatch, capsys):
    read, write = os.pipe()
    pipe = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    log_to_console(verbose=False)
    log = logging.getLogger("zeroflow.some.module")
    log.info("first")
    assert os.read(read, 100).endswith(b"first\n")
    os.close(read)  # as `head` does
    for _ in range(3):
        log.info("unread")
    sys.stdout.write("printed as well")
    sys.stdout.flush()
    assert capsys.readouterr().err == "", "no complaint of logging"
    with suppress(BrokenPipeError):  # it holds what could not be written
        pipe.close()


def test_no_text_from_outside_reaches_a_terminal_as_a_command(console, capsys):
    error = ValueError("/data/\x1b[2Jx.txt cannot be read")
    error.add_note("retry: \x9b1m")
    fail(error, verbose=False)
    said = capsys.readouterr().err
    assert said == "error: /data/\\u001b[2Jx.txt cannot be read\nretry: \\u009b1m\n"
    log_to_console(verbose=False)
    logging.getLogger("zeroflow.some.module").warning("bad line in %s", "\x1b]0;x\x07")
    assert capsys.readouterr().out.endswith("bad line in \\u001b]0;x\\u0007\n")


def test_output_in_another_encoding_can_show_every_character(console, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="latin-1") as file:
        monkeypatch.setattr(sys, "stdout", file)
        log_to_console(verbose=False)
        show("é → 漢")
    assert (tmp_path / "out").read_bytes() == "é \\u2192 \\u6f22\n".encode("latin-1")

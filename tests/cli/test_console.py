"""What a command says to a person, and with which code it ends."""

import logging
import os
import signal
import sys
from contextlib import suppress

import pytest
from pydantic import ValidationError

from zeroflow.cli.console import (
    Terminated,
    complaint,
    fail,
    log_to_console,
    require_writable,
    terminate,
)
from zeroflow.settings.run_config import RunConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"training": {"batch_size": "0"}}, "--batch-size: .* greater than 0 .found '0'"),
        ({"training": {"seq_len": 1}}, "--seq-len: .* greater than or equal to 2"),
        ({"run_name": "a/b"}, "--run-name: .*'a/b'"),
        ({"model": {"hidden_size": 32}}, "^a shape of your own needs num_hidden_layers"),
        ({"data": {"data_mode": "files"}}, "^data_mode files needs data_path"),
    ],
)
def test_complaint_is_in_the_words_of_the_command_line(given, message):
    with pytest.raises(ValidationError) as refused:
        RunConfig.model_validate(given)
    said = complaint(refused.value)
    assert said.count("\n") == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)


def test_complaint_of_another_error_is_its_message_or_at_least_its_kind():
    assert complaint(ValueError("no room")) == "no room"
    assert complaint(TimeoutError()) == "TimeoutError"


def test_failure_is_told_with_its_notes_and_a_traceback_only_if_asked_for(console, capsys, caplog):
    error = ValueError("the disk is full")
    error.add_note("retry: the same command")
    assert fail(error, verbose=False) == 1
    assert capsys.readouterr().err == "error: the disk is full\nretry: the same command\n"
    assert not caplog.records
    assert fail(error, verbose=True, code=2) == 2
    [record] = caplog.records
    assert record.exc_info and record.exc_info[1] is error


def test_folder_that_takes_nothing_is_refused_before_anything_is_done(tmp_path):
    new = tmp_path / "a" / "b"
    require_writable(new)
    assert new.is_dir() and not list(new.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to .*file.*--cache-dir"):
        require_writable(tmp_path / "file")


def test_sigterm_ends_like_ctrl_c_with_a_code_of_its_own():
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        with pytest.raises(Terminated) as ended:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143


def test_lines_go_to_standard_output_and_details_only_if_asked_for(console, capsys):
    log = logging.getLogger("zeroflow.some.module")
    log_to_console(verbose=False)
    log.info("building shards")
    log.debug("a detail")
    assert capsys.readouterr().out.split("  ", 1)[1] == "building shards\n"
    logging.getLogger("zeroflow").handlers.clear()
    log_to_console(verbose=True)
    log.debug("a detail")
    assert "a detail" in capsys.readouterr().out


def test_run_outlives_the_reader_of_its_lines(console, monkeypatch, capsys):
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

import threading
import time
from itertools import islice

import pytest

from zeroflow.data.read_ahead import read_ahead


def test_reader_thread_ends_with_those_who_wait_for_it(text, tmp_path):
    def endless():
        while True:
            yield 1

    ahead = read_ahead(endless())
    assert list(islice(ahead, 5)) == [1] * 5
    ahead.close()
    for _ in range(100):
        if not any(thread.name == "read-ahead" for thread in threading.enumerate()):
            return
        time.sleep(0.05)
    pytest.fail("the thread is still alive")

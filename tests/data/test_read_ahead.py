import threading
from itertools import islice

from patience import wait_until

from zeroflow.data.read_ahead import read_ahead


def test_reader_thread_ends_with_its_consumer(text, tmp_path):
    def endless():
        while True:
            yield 1

    ahead = read_ahead(endless())
    assert list(islice(ahead, 5)) == [1] * 5
    ahead.close()
    wait_until(lambda: not any(t.name == "read-ahead" for t in threading.enumerate()))

import json
import math
import os
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from tiny import RandomBatches, training_config

from zeroflow.run_folder import RunFolder
from zeroflow.training import goodput
from zeroflow.training.goodput import BOOKINGS, PHASES, Account, Booking, Clock, PhaseLedger
from zeroflow.training.loop import train
from zeroflow.training.state import new_state


def begun(now: float = 0.0) -> Clock:
    return Clock(now or time.time(), device="cpu")


def booking(step: int, time: float, *, ended: bool = False, began: float | None = None, **seconds):
    return Booking(step=step, time=time, ended=ended, seconds=seconds, began=began)


def test_phases_add_up_to_the_time_since_the_launch(tmp_path):
    created = time.time()
    clock = begun(created - 5)
    step = ("data", "forward_backward", "optimizer", "data", "logging")
    for phase in (*step, *step):
        clock.enter(phase)
        time.sleep(0.01)
    account = PhaseLedger(RunFolder(tmp_path), clock).book(2, first=True)
    passed = time.time() - created
    # one sleeps no shorter than asked for; the two clocks differ by less than a second
    assert 4 < account.seconds["start"] < 6 + passed
    assert account.seconds["data"] >= 0.02 and account.seconds["optimizer"] >= 0.01
    assert account.seconds["first_step"] >= 0.04 and account.seconds["logging"] >= 0.02
    assert 4 + account.seconds["first_step"] < account.wall < 6 + passed
    assert sum(account.shares.values()) == pytest.approx(1)
    assert set(account.seconds) == set(PHASES)
    assert goodput.read(RunFolder(tmp_path)).seconds == account.seconds


def bookings(folder) -> list[Booking]:
    return BOOKINGS.read(RunFolder(folder).goodput)


class SlowBatches(RandomBatches):
    def micro_batches(self, step):
        time.sleep(0.02)
        return super().micro_batches(step)


def test_slow_source_of_batches_is_seen_as_data_wait():
    config, clock = training_config(steps=10), begun()
    for _ in train(new_state(config), SlowBatches(), config, clock.enter):
        clock.enter("logging")
    clock.settle()
    slow = clock.seconds
    assert slow["data"] >= 9 * 0.02, "it sleeps for each of nine steps"
    assert slow["forward_backward"] > 0 and slow["optimizer"] > 0


def test_killed_process_costs_its_steps_since_the_checkpoint_and_the_time_until_the_next():
    killed = [
        booking(0, 102.0, began=100.0, start=2.0),
        booking(10, 112.0, compile=3.0, forward_backward=7.0),
        booking(20, 122.0, forward_backward=9.0, logging=1.0),
        booking(25, 127.0, forward_backward=4.0, data=1.0),
    ]
    resumed = [
        booking(10, 140.0, began=138.0, start=2.0),  # from the checkpoint of step 10
        booking(20, 151.0, forward_backward=10.0, optimizer=1.0),
    ]
    account = Account([*killed, *resumed])
    assert account.wall == pytest.approx(151.0 - 100.0), "nothing is missing, nothing twice"
    assert account.seconds["restarts"] == pytest.approx(10 + 5 + (138 - 127))
    assert account.seconds["start"] == 4 and account.seconds["compile"] == 3
    assert account.seconds["forward_backward"] == 7 + 10
    assert account.training == 7 + 10 + 1
    assert account.steps == 9 + 9, "20 steps, each once, without the first of each process"
    assert (account.restarts, account.steps_again) == (1, 15)
    assert account.goodput == pytest.approx(18 / 51)


def test_clean_stop_is_not_charged_for_the_time_until_the_resume():
    account = Account(
        [
            booking(0, 101.0, began=100.0, start=1.0),
            booking(7, 110.0, ended=True, forward_backward=9.0),
            booking(7, 9002.0, began=9000.0, start=2.0),
        ]
    )
    assert account.wall == 12 and account.seconds["restarts"] == 0
    assert account.steps == 6
    assert (account.restarts, account.steps_again) == (0, 0)


def test_process_that_never_finished_starting_counts_as_restart_time():
    account = Account(
        [booking(5, 10.0, began=0.0, start=10.0), booking(5, 60.0, began=50.0, start=10.0)]
    )
    assert account.seconds["restarts"] == 40 and account.wall == 60


def test_phase_of_an_older_version_is_left_out():
    books = Account(
        [booking(0, 10, began=0, start=10), booking(5, 30, ended=True, data=12, other=8)]
    )
    assert books.wall == 22 and sum(books.shares.values()) == 1


def test_half_written_line_of_a_killed_process_is_not_counted(tmp_path):
    PhaseLedger(RunFolder(tmp_path), begun()).book(3, first=True)
    with RunFolder(tmp_path).goodput.open("a") as file:
        file.write('{"step": 4, "ti')
    books = PhaseLedger(RunFolder(tmp_path), begun())
    books.book(3, first=True)
    assert [booking.step for booking in bookings(tmp_path)] == [3, 3]
    assert goodput.read(RunFolder(tmp_path)).restarts == 1


TRAIN = """
import sys, time
from itertools import islice
from pathlib import Path
from tiny import RandomBatches, training_config
from zeroflow.run_folder import RunFolder
from zeroflow.training.goodput import PhaseLedger, Clock
from zeroflow.training.loop import train
from zeroflow.training.state import new_state

config, clock = training_config(steps=10**6), Clock(time.time(), device="cpu")
state, books = new_state(config), PhaseLedger(RunFolder(Path(sys.argv[1])), clock)
books.book(0, first=True)
for _ in train(state, RandomBatches(), config, clock.enter):
    clock.enter("logging")
    books.book(state.step)
    print(state.step, flush=True)
"""


def test_account_survives_sigkill(tmp_path):
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    said = list(islice(process.stdout, 20))
    process.kill()
    said += process.stdout.readlines()
    process.wait()
    died = time.time()
    time.sleep(0.3)
    account = PhaseLedger(RunFolder(tmp_path), begun(resumed := time.time())).book(5, first=True)
    assert account.steps_again >= int(said[-1]) - 5 and account.restarts == 1
    assert account.seconds["restarts"] >= resumed - died
    assert account.wall <= time.time() - began
    assert account.training > 0, "of the five steps that count"


def test_summary_names_the_largest_phases():
    account = Account([booking(1, 100.0, began=0.0, start=10.0, forward_backward=80.0, data=10.0)])
    text = goodput.summary(account.shares, account.wall)
    assert text.startswith("1 min 40 s: forward/backward 80.0%, start 10.0%, data wait 10.0%")
    assert math.isclose(account.goodput, 0.8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_time_belongs_to_the_phase_that_queued_the_work():
    """Asked for in no time, and waited for later, in another phase."""
    clock = Clock(time.time(), device="cuda")
    matrix = torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    clock.enter("logging")  # of a first step
    clock.enter("forward_backward")
    for _ in range(20):
        matrix @ matrix
    clock.enter("data")
    time.sleep(0.01)  # hidden by the device, which is still busy
    clock.enter("optimizer")
    matrix @ matrix
    clock.enter("logging")
    torch.cuda.synchronize()
    clock.settle()
    seconds = clock.seconds
    assert seconds["forward_backward"] > 10 * seconds["optimizer"]
    assert seconds["data"] < 0.002 and seconds["logging"] < 0.01


def test_lines_of_an_older_version_are_read_and_written_with_the_same_fields(tmp_path):
    path = tmp_path / "goodput.jsonl"
    old = [
        '{"step": 0, "time": 1790.8, "ended": false, "seconds": {"start": 2.7}, "began": 1788.1}',
        '{"step": 60, "time": 1792.8, "ended": true, "seconds": {"checkpoint": 0.0287606489999}}',
    ]
    path.write_text("\n".join(old) + "\n")
    read = BOOKINGS.read(path)
    for booking in read:
        BOOKINGS.append(path, booking)
    again = [json.loads(line) for line in path.read_text().splitlines()[2:]]
    assert again == [{"format": 1} | json.loads(line) for line in old]


def test_account_of_an_extension_has_its_own_steps_only(tmp_path):
    folder = RunFolder(tmp_path)
    for each in (
        booking(0, 101.0, began=100.0, start=1.0),
        booking(20, 160.0, ended=True, forward_backward=59.0),
        booking(20, 201.0, began=200.0, start=1.0),  # extended here, and killed
        booking(24, 205.0, forward_backward=4.0),
        booking(20, 211.0, began=210.0, start=1.0),
        booking(40, 231.0, ended=True, forward_backward=20.0),
        booking(40, 301.0, began=300.0, start=1.0, ended=True),
    ):
        BOOKINGS.append(folder.goodput, each)
    whole, own = goodput.read(folder), goodput.read(folder, after=20)
    assert (whole.steps, whole.training) == (19 + 19, 79)
    assert (own.steps, own.training) == (19, 20), "one step is the first of its process"

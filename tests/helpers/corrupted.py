"""The training program with planted faults.

Memory that turns a weight into NaN once, and a clock that jumps by days.
"""

import itertools
import math
import time

import torch

from zeroflow.training import __main__, loop
from zeroflow.training.job import TrainingJob
from zeroflow.training.rank_program import RankProgram

AT_STEP = 78
DAYS = itertools.cycle([0, 3, -2, 1, -5])
train_step, now = loop.train_step, time.time


def jumping_time():
    return now() + 86_400 * next(DAYS)


def corrupting_step(state, *given):
    if state.step == AT_STEP - 1:
        with torch.no_grad():
            state.model.model.norm.weight[0] = math.nan
    return train_step(state, *given)


def work(job, stop):
    time.time = jumping_time
    if len(job.skips) == 1:  # the start after the spike
        loop.train_step = corrupting_step
    __main__.work(job, stop)


PROGRAM = RankProgram(TrainingJob, work)

"""The training program with a planted fault: memory that turns a weight into no number, once."""

import math

import torch

from zeroflow.training import __main__ as program
from zeroflow.training import loop, worker
from zeroflow.training.job import TrainingJob

AT_STEP = 78
train_step = loop.train_step


def corrupting_step(state, micro_batches, config):
    if state.step == AT_STEP - 1:
        with torch.no_grad():
            state.model.model.norm.weight[0] = math.nan
    return train_step(state, micro_batches, config)


def work(job, stop):
    if len(job.skips) == 1:  # the start after the spike
        loop.train_step = corrupting_step
    program.work(job, stop)


if __name__ == "__main__":
    worker.main(TrainingJob, work)

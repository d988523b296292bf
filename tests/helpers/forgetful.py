"""The training program with a planted fault: random numbers that no checkpoint contains."""

import random

import torch

from zeroflow.training import __main__, loop
from zeroflow.training.job import TrainingJob
from zeroflow.training.rank_program import RankProgram

forgotten = random.Random(0)
train_step = loop.train_step


def noisy_step(state, *given):
    with torch.no_grad():
        state.model.model.norm.weight.add_(forgotten.gauss(0, 1e-3))
    return train_step(state, *given)


def work(job, stop):
    loop.train_step = noisy_step
    __main__.work(job, stop)


PROGRAM = RankProgram(TrainingJob, work)

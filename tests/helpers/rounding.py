"""The errors of rounding to fp8."""

import torch

# Root-mean-square relative error of rounding: 2.6 % with 4 bits of significand (e4m3), 5.1 % with 3
# (e5m2). Values are a step of 2^-3 or 2^-2 of the power of two below apart, and the error uniform
# between. A product has the errors of both factors
OFF_VALUES = 2**0.5 * 0.026
OFF_GRADIENTS = (0.026**2 + 0.051**2) ** 0.5


def error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item()

"""Quantiles of Student's t distribution."""

import math
from functools import cache

import numpy as np


@cache
def student(share: float, freedom: float) -> float:
    """Return the half-width of the interval that contains `share` of Student's t distribution.

    With t = √f · tan θ, the density is proportional to cos^(f-1) θ, which is integrated numerically
    here, to four digits. SciPy would be a large dependency for one function.

    Args:
        freedom: degrees of freedom, any number from 1 on.
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    held = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(share, held / held[-1], angles)))

import subprocess
import sys

import pytest
import torch

from zeroflow.training.early_gpu import EarlyGpu

OPEN = """
import sys, time, torch
from zeroflow.training.early_gpu import EarlyGpu

gpu = EarlyGpu(seconds=10)
gpu.open()
gpu.open()
if "works" in sys.argv:
    gpu.keep()
    assert torch.cuda.is_initialized()
    assert torch.ones(2, device="cuda").sum().item() == 2
    time.sleep(12)
else:
    time.sleep(60)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_job_works_where_the_gpu_cannot_be_opened():
    gpu = EarlyGpu(seconds=0.01)
    gpu.keep()  # the rank was not asked to open it
    gpu.open()
    gpu.keep()
    assert not torch.cuda.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("argument", "code"), [("works", 0), ("waits", 1)])
def test_process_keeps_an_open_gpu_only_for_a_job(argument, code):
    done = subprocess.run(
        [sys.executable, "-c", OPEN, argument], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == code, done.stderr

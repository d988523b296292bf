import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import MODEL, WORKLOAD, ArrayRows, lively_model

from zeroflow.training.validation import bits_per_byte, validation_loss

IDS = np.random.default_rng(0).integers(MODEL.vocab_size, size=(10, 9), dtype=np.int32)
ROWS = IDS.view(ArrayRows)


def loss_of(row: np.ndarray) -> float:
    tokens = torch.from_numpy(row.astype(np.int64))
    with torch.no_grad():
        return float(F.cross_entropy(lively_model()(tokens[None, :-1])[0], tokens[1:]))


# fewer rows than the micro-batch, as many, and a last micro-batch that is not full
@pytest.mark.parametrize("micro_batch_rows", [1, 3, 5, 10, 16])
@pytest.mark.parametrize("count", [1, 2, 5, 10, 99])
def test_loss_is_the_mean_over_the_first_rows_however_they_are_batched(count, micro_batch_rows):
    expected = np.mean([loss_of(row) for row in ROWS[:count]])
    workload = WORKLOAD.replace(micro_batch_rows=micro_batch_rows)
    loss = validation_loss(lively_model(), ROWS, count, workload)
    assert loss == pytest.approx(expected, abs=1e-5)  # fp32 sums in another order


def test_validation_leaves_no_gradient():
    model = lively_model()
    validation_loss(model, ROWS, 4, WORKLOAD)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_guessing_among_all_bytes_costs_eight_bits_a_byte():
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import MODEL, WORKLOAD, ArrayRows, lively_model

from zeroflow.training.validation import bits_per_byte, validation_loss

IDS = np.random.default_rng(0).integers(MODEL.vocab_size, size=(10, 9), dtype=np.int32)
ROWS = IDS.view(ArrayRows)


class EndsAt0(ArrayRows):
    end_of_text = 0


def loss_of(row: np.ndarray) -> float:
    return losses_of(row).mean()


def losses_of(row: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(row.astype(np.int64))
    with torch.no_grad():
        logits = lively_model()(tokens[None, :-1])[0]
        return F.cross_entropy(logits, tokens[1:], reduction="none").double().numpy()


# fewer rows than the micro-batch, as many, and a last micro-batch that is not full
@pytest.mark.parametrize("micro_batch_rows", [1, 3, 5, 10, 16])
@pytest.mark.parametrize("chosen", [[7], [2, 5], [0, 1, 4, 8, 9], range(10)])
def test_loss_is_the_mean_over_the_chosen_rows_for_any_micro_batch(chosen, micro_batch_rows):
    each = [loss_of(row) for row in ROWS[list(chosen)]]
    workload = WORKLOAD.replace(micro_batch_rows=micro_batch_rows)
    loss = validation_loss(lively_model(), ROWS, np.array(chosen), workload)
    assert loss.mean == pytest.approx(np.mean(each), abs=1e-5)  # fp32 sums in another order
    if len(each) == 1:
        assert loss.standard_error is None
    else:  # rows of equal length: the textbook's standard error of a mean
        expected = np.std(each, ddof=1) / math.sqrt(len(each))
        assert loss.standard_error == pytest.approx(expected, rel=1e-3)


def test_standard_error_predicts_the_spread_over_samples_of_padded_rows():
    rows = IDS.copy()
    for number, row in enumerate(rows):  # of 2 to 8 targets
        row[2 + 6 * number // 9 :] = EndsAt0.end_of_text
    losses = [loss_of_sample(rows, sample) for sample in combinations(range(10), 5)]
    means = [loss.mean for loss in losses]
    # The sample is half of the population, which halves the variance: Cochran 1977, section 2.8
    expected = np.std(means) * math.sqrt(2)
    assert np.mean([loss.standard_error for loss in losses]) == pytest.approx(expected, rel=0.15)


def test_sampled_units_of_the_standard_error_are_documents():
    tokens = np.array([losses_of(row) for row in ROWS])  # (10, 8)
    documents = np.repeat([0, 0, 0, 1, 1, 2, 3, 3, 3, 3], 8).reshape(10, 8)
    documents[2, 5:] = 4  # three documents in two rows: rows alone could not tell them apart
    documents[3, :2] = 4
    loss = validation_loss(lively_model(), ROWS, np.arange(10), WORKLOAD, documents)
    sizes = np.bincount(documents.flat)
    sums = np.bincount(documents.flat, tokens.flat)
    spread = ((sums - tokens.mean() * sizes) ** 2).sum() * 5 / 4  # of five units
    assert loss.mean == pytest.approx(tokens.mean(), abs=1e-5)  # fp32 sums in another order
    assert loss.nats == pytest.approx(sums, rel=1e-4)
    assert loss.standard_error == pytest.approx(math.sqrt(spread) / 80, rel=1e-3)
    one = validation_loss(lively_model(), ROWS, np.arange(10), WORKLOAD, 0 * documents)
    assert one.standard_error is None


def loss_of_sample(rows, sample):
    return validation_loss(lively_model(), rows.view(EndsAt0), np.array(sample), WORKLOAD)


def test_validation_leaves_no_gradient():
    model = lively_model()
    validation_loss(model, ROWS, np.arange(4), WORKLOAD)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_uniform_guess_over_bytes_costs_eight_bits_per_byte():
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(256), bytes_per_token=4) == pytest.approx(2)

"""Records as training logs them, with defaults for fields that a test does not check."""

from typing import Any

from zeroflow.training.metrics import StepRecord, ValidationRecord


def step_record(step: int, loss: float = 5.0, **values: Any) -> StepRecord:
    usual = {"tokens": 64 * step, "time": float(step), "lr": 1e-3, "grad_norm": 1.0}
    return StepRecord(step=step, loss=loss, **{"tokens_per_second": None} | usual | values)


def validation_record(step: int, loss: float = 5.0, **values: Any) -> ValidationRecord:
    usual = {"tokens": 64 * step, "time": float(step), "val_bpb": None, "sample": "the"}
    return ValidationRecord(step=step, val_loss=loss, **usual | values)

import json
from pathlib import Path

import format1
import pytest
from tiny import MODEL

from zeroflow.estimate import history
from zeroflow.estimate.history import SAME_MARGINS, Experience, Figures, Past
from zeroflow.estimate.speed import Rate
from zeroflow.run_folder import Cache
from zeroflow.training.job import TrainingJob
from zeroflow.training.optimizers.adamw import AdamW
from zeroflow.training.workload import Workload

WORK = Workload(
    device="cuda",
    device_name="NVIDIA H100 80GB HBM3",
    model=MODEL,
    seq_len=128,
    micro_batch_rows=8,
    accumulate=2,
    precision="bf16",
    compile=True,
    deterministic=False,
    document_mask=False,
    activation_checkpointing="none",
)
NOTHING = Figures(
    tokens_per_second=None,
    seconds=None,
    memory_bytes=None,
    shard_bytes=None,
    checkpoint_bytes=None,
)


ON_GPU = SAME_MARGINS["cuda"]
ONE = (Rate.around([100.0], ON_GPU), 1000, "from 1 earlier run here", 1)
BOTH = (Rate.around([100.0, 200.0], ON_GPU), 1200, "from 2 earlier runs here", 2)


def past(run: str, rate: float, *, memory: int = 1000, **changes) -> Past:
    measured = NOTHING.replace(tokens_per_second=rate, memory_bytes=memory)
    work = WORK.replace(**changes)
    return Past(run=run, steps=10, workload=work, predicted=NOTHING, measured=measured)


def known_here(cache: Path, work: Workload, **planned) -> Experience | None:
    return history.known(history.read(cache), work, **planned)


def test_first_run_on_a_machine_knows_nothing(tmp_path):
    assert known_here(tmp_path, WORK) is None


def test_runs_of_the_same_workload_predict_speed_and_memory(tmp_path):
    history.append(tmp_path, past("a", 100.0, memory=1000))
    history.append(tmp_path, past("b", 200.0, memory=1200))
    history.append(tmp_path, past("other batch", 1.0, micro_batch_rows=4))
    assert known_here(tmp_path, WORK) == BOTH
    assert known_here(tmp_path, WORK, planned=("b", 10)) == ONE
    assert known_here(tmp_path, WORK, planned=("b", 11)) == BOTH, "it is being extended"


def test_old_runs_are_ignored(tmp_path):
    for number in range(8):
        history.append(tmp_path, past(f"run {number}", float(number)))
    known = known_here(tmp_path, WORK)
    assert known is not None and known.rate.expected == 5.0, "of runs 3 to 7"


def test_run_of_another_model_predicts_the_flops_per_second(tmp_path):
    wide, deep = MODEL.replace(hidden_size=64), MODEL.replace(num_hidden_layers=40)
    history.append(tmp_path, past("wide", 100.0, model=wide))
    history.append(tmp_path, past("deep", 900.0, model=deep))
    known = known_here(tmp_path, WORK)
    assert known is not None and known.memory_bytes is None
    expected = 100 * wide.flops_per_token(128) / MODEL.flops_per_token(128)
    assert known.rate.expected == pytest.approx(expected), "the nearest in size"
    assert "1 earlier run here" in known.source


def test_model_of_a_very_different_size_predicts_nothing(tmp_path):
    history.append(tmp_path, past("large", 100.0, model=MODEL.replace(num_hidden_layers=400)))
    assert known_here(tmp_path, WORK) is None


@pytest.mark.parametrize(
    "change",
    [{"device_name": "NVIDIA L4"}, {"precision": "fp32"}, {"fp8": True}, {"document_mask": True}],
)
def test_another_device_or_other_code_predicts_nothing(tmp_path, change):
    history.append(tmp_path, past("a", 100.0, **change))
    assert known_here(tmp_path, WORK) is None


def test_half_written_line_of_a_killed_process_is_skipped_and_replaced(tmp_path):
    history.append(tmp_path, past("a", 100.0))
    file = tmp_path / "plans.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    history.append(tmp_path, past("b", 300.0))
    assert [entry.run for entry in history.read(tmp_path)] == ["a", "b"]
    file.write_bytes(file.read_bytes() + b'{"of": "another version"}\n[]\n\xff\n')
    assert [entry.run for entry in history.read(tmp_path)] == ["a", "b"]


def test_run_is_recorded_once_and_again_after_an_extension(tmp_path):
    history.append(tmp_path, past("a", 100.0))
    history.append(tmp_path, past("a", 500.0))
    history.append(tmp_path, past("a", 200.0).replace(steps=20))
    rates = [entry.measured.tokens_per_second for entry in history.read(tmp_path)]
    assert rates == [100.0, 200.0]


def test_settings_of_the_optimiser_do_not_affect_the_cost(tmp_path):
    history.append(tmp_path, past("a", 100.0, optimizer=AdamW(beta2=0.99)))
    assert known_here(tmp_path, WORK) == ONE


def test_line_of_format_1_is_read(tmp_path):
    Cache(tmp_path).plans.write_text(json.dumps(format1.PAST) + "\n")
    job = TrainingJob.model_validate(format1.JOB)
    known = known_here(tmp_path, job.training.workload)
    assert known is not None and known.rate.expected == 28430.212804924948
    assert known[1:] == (480882688, "from 1 earlier run here", 1)

"""The expected loss from earlier runs, and the report of a run that leaves it."""

import itertools
import math
import time
from pathlib import Path

import format1
import numpy as np
import pytest
from logged import step_record, validation_record
from matplotlib.image import imread
from tiny import MODEL, training_config, training_job, with_workload

from zeroflow import artifacts
from zeroflow.data.shards import ShardSet, SplitCounts
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.report import band
from zeroflow.report.plots import loss_curve
from zeroflow.report.progress import LossWatch
from zeroflow.run_folder import RunFolder
from zeroflow.training.events import EVENTS, Done, Failed, Metrics, Started
from zeroflow.training.job import Cadence, TrainingJob
from zeroflow.training.metrics import METRICS, MetricsRecord, StepRecord

STEPS, STEP_TOKENS = 200, 64
WINDOW = 10 * STEP_TOKENS
"""Tokens in a twentieth of a run."""

COUNTS = SplitCounts(rows=1000, documents=10, document_tokens=32_000, text_bytes=90_000)
TOKENS = Tokenizer(name="t", path=None, vocab_size=256, end_of_text=0, fingerprint="t")


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return ShardSet(
        path=tmp_path / "shards" / "sample-32-0123456789ab",
        parts=1,
        reused=True,
        row_tokens=33,
        end_of_text=0,
        train=COUNTS,
        validation=COUNTS,
        empty_documents=0,
        duplicates=0,
        bad_lines=0,
        entropy=None,
    )


@pytest.fixture
def make(tmp_path, shards):
    """A function that makes the folder of a run of 200 steps that is about to be trained."""

    def made(name: str, *, seed: int = 0, steps: int = STEPS, **changes) -> TrainingJob:
        training = training_config(steps=steps, seed=seed, **changes)
        folder = tmp_path / "runs" / name
        folder.parent.mkdir(exist_ok=True)
        job = training_job(folder, shards, TOKENS, training)
        job.write(job.folder.job)
        return job

    return made


def usual(step: int) -> float:
    return 2 + 4 * math.exp(-step / 40)


def train(job: TrainingJob, time: float, above: float = 0.0, *, to: int = STEPS, of: int = STEPS):
    """Write the files of a run up to step `to`, with a loss that is `above` the usual one."""
    EVENTS.append(job.folder.events, Started(time=time, step=0, steps=of, parts=1))
    for record in losses(above, to=to):
        METRICS.append(job.folder.metrics, record)


def losses(above: float = 0.0, *, since: int = 0, until: int = STEPS, to: int = STEPS):
    """Records of the usual loss, but `above` it in steps `since` + 1 to `until`."""
    yield validation_record(0, 6.0)
    for step in range(1, to + 1):
        apart = above if since < step <= until else 0.0
        yield step_record(step, usual(step) + apart, tokens=step * STEP_TOKENS)


def found(job: TrainingJob) -> band.Band:
    expected = band.find(job)
    assert expected is not None
    return expected


@pytest.fixture
def job(make) -> TrainingJob:
    """A run after three others whose losses are 0.1 above, at and 0.1 below the usual ones."""
    train(make("high", seed=1), 1.0, 0.1)
    train(make("low", seed=2), 2.0, -0.1)
    train(make("usual", seed=3), 3.0)
    return make("mine")


WIDTH = 5.604 * math.sqrt(0.1**2 * (1 + 1 / 3))
"""By scipy's t at five degrees of freedom, half of those of three runs in five windows, and at
5 % shared by twenty windows."""


def test_band_is_the_interval_of_one_more_run_in_all_windows_at_once(job):
    expected = found(job)
    assert expected.runs == ("high", "low", "usual")
    _, mean, width = expected.expected([])
    assert width == pytest.approx([WIDTH] * 20, rel=1e-3)
    first = sum(map(usual, range(1, 11))) / 10
    assert mean[0] == pytest.approx(first)
    assert list(expected.ends) == [WINDOW * n for n in range(1, 21)]


def test_two_runs_give_a_very_wide_spread(job):
    two = found(job)._replace(earlier=found(job).earlier[:2])
    assert all(math.isnan(one) for one in two.expected([]).width)
    assert str(two.verdict(losses(0.2))) == (
        "no band yet from 2 earlier runs: 0.2000 above at 12,800 tokens"
    )


@pytest.mark.parametrize(("windows", "t"), [(1, 19.962), (2, 19.962), (3, 9.465), (4, 6.758)])
def test_spread_of_few_windows_is_wider_by_the_t_of_a_textbook(make, windows, t):
    for seed, above in ((1, 0.1), (2, -0.1), (3, 0.0)):
        train(make(f"run {seed}", seed=seed), seed, above, to=10 * windows)
    width = found(make("mine")).expected([]).width
    assert width[0] == pytest.approx(t * math.sqrt(0.1**2 * (1 + 1 / 3)), rel=0.01)
    assert all(math.isnan(one) for one in width[windows:])


def correlated(runs: int, rho: float, share: float, random: np.random.Generator) -> np.ndarray:
    """Losses of `runs` runs at 40 steps: an autoregressive process over windows, and noise.

    Args:
        share: share of the variance of a window that is correlated with other windows.
    """
    slow = np.empty((runs, 20))
    slow[:, 0] = random.standard_normal(runs)
    for window in range(1, 20):
        fresh = math.sqrt(1 - rho**2) * random.standard_normal(runs)
        slow[:, window] = rho * slow[:, window - 1] + fresh
    noise = math.sqrt(2 * (1 - share)) * random.standard_normal((runs, 40))
    spread = 0.05 + 0.1 * np.linspace(0, 1, 40)  # as of real seeds, it grows
    return 3 + spread * (math.sqrt(share) * slow.repeat(2, axis=1) + noise)


@pytest.mark.parametrize("runs", [3, 5, 8])
@pytest.mark.parametrize(("rho", "share"), [(0.77, 1.0), (0.99, 0.7), (0.0, 0.0)])
def test_normal_runs_stay_inside_at_least_as_often_as_promised(make, runs, rho, share):
    """Whatever the correlation of their windows: 0.77 was found over 16 real seeds."""
    random, inside, trials = np.random.default_rng(runs), 0, 600
    job = make("mine", steps=40)
    for _ in range(trials):
        mine, *others = correlated(runs + 1, rho, share, random)
        earlier = tuple(band.EarlierRun(f"{n}", n, 1.0, x) for n, x in enumerate(others))
        records = [step_record(n, x) for n, x in enumerate(mine.tolist(), 1)]
        verdict = band.Band(job, earlier).verdict(records)
        assert verdict.judged and verdict.earlier == runs
        inside += verdict.since is None
    assert 0.94 <= inside / trials <= 0.999


NOISE = np.random.default_rng(0).standard_normal((4, STEPS + 1))
"""Of the loss at every step, by seed."""


def noisy(seed: int, every: int) -> list[MetricsRecord]:
    """Records of a run that logs at an interval."""
    steps = [n for n in range(1, STEPS + 1) if n % every == 0 or n in (1, STEPS)]
    return [step_record(n, usual(n) + NOISE[seed, n]) for n in steps]


def test_runs_are_compared_over_the_steps_that_both_logged(make):
    def log(name: str, seed: int, every: int) -> None:
        job = make(name, seed=seed)
        EVENTS.append(job.folder.events, Started(time=1.0, step=0, steps=STEPS, parts=1))
        for record in noisy(seed, every):
            METRICS.append(job.folder.metrics, record)

    log("same seed", 0, every=10)
    mine = make("mine", seed=0).replace(cadence=Cadence(log=4, validate_=10, checkpoint=10))
    verdict = found(mine).verdict(noisy(0, 4))
    assert verdict.apart == 0.0, "the same losses for any interval"
    assert str(verdict) == "no band yet from 1 earlier run: equal at 12,800 tokens"

    for seed, every in ((1, 1), (2, 3), (3, 5)):
        log(f"every {every}", seed, every)
    own, mean, width = found(mine).expected(noisy(0, 4))
    # in the second window, steps 11 to 20, the run logs steps 12, 16 and 20
    own_noise, *others = NOISE
    common = [[20], [12, 16, 20], [12], [20]]
    apart = [
        np.mean(own_noise[steps] - other[steps])
        for steps, other in zip(common, [own_noise, *others], strict=True)
    ]
    assert own[1] - mean[1] == pytest.approx(np.mean(apart))
    assert not np.isnan(width).all()


def test_run_within_the_band_is_in_band(job):
    for above in (0.0, 0.9 * WIDTH, -0.9 * WIDTH):
        assert str(found(job).verdict(losses(above))) == "in band (3 earlier runs)"


def test_run_that_leaves_the_band_is_reported_with_place_and_distance(job):
    verdict = found(job).verdict(losses(WIDTH + 0.31, since=60))
    assert (verdict.since, verdict.until) == (6 * WINDOW, None)
    assert verdict.distance == pytest.approx(0.31, abs=1e-3)
    distance = f"{verdict.distance:.4f}"
    assert (
        str(verdict) == f"out of band from 3,840 tokens: up to {distance} above it (3 earlier runs)"
    )
    verdict = found(job).verdict(losses(-WIDTH - 0.05, since=60, until=100))
    assert (verdict.since, verdict.until) == (6 * WINDOW, 10 * WINDOW)
    assert verdict.distance == pytest.approx(-0.05, abs=1e-3)
    assert "from 3,840 to 6,400 tokens: up to 0.0" in str(verdict) and "below it" in str(verdict)


def test_one_complete_window_beyond_the_edge_is_reported(job):
    expected = found(job)
    assert expected.verdict(losses(1.0, since=60, until=70)).since == 6 * WINDOW
    assert expected.verdict(losses(1.0, since=60, to=69)).since is None
    assert expected.verdict(losses(1.0, since=60, to=70)).since == 6 * WINDOW


def test_first_run_has_nothing_to_be_compared_with(make):
    assert band.find(make("mine")) is None


def test_one_earlier_run_has_no_spread(make):
    train(make("other", seed=1), 1.0)
    verdict = found(make("mine")).verdict(losses(0.2, to=104))
    assert str(verdict) == "no band yet from 1 earlier run: 0.2000 above at 6,400 tokens"


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 2},
        {"peak": 2e-2},
        {"steps": 400},
        {"z_loss": 1e-5},
        {"document_mask": True},
    ],
)
def test_run_with_another_mathematics_is_not_used(make, change):
    other = make("other", seed=1, **change)
    train(other, 1.0, of=other.training.steps)
    assert band.find(make("mine")) is None


def test_run_of_another_model_or_other_data_is_not_used(make, shards):
    mine = make("mine")
    of_another_model = with_workload(
        mine.training.replace(seed=1), model=MODEL.replace(hidden_size=64)
    )
    for name, change in {
        "model": {"training": of_another_model},
        "data": {"shards": shards.replace(path=shards.path.with_name("sample-32-another"))},
        "parts": {"shards": shards.replace(parts=2)},
    }.items():
        other = make(name, seed=1).replace(**change)
        other.write(other.folder.job)
        train(other, 1.0)
    assert band.find(mine) is None


def test_how_a_step_is_computed_does_not_matter(make):
    gpu = {"device": "cuda", "device_name": "a GPU", "precision": "bf16", "compile": True}
    train(make("other", seed=1, micro_batch_rows=1, accumulate=2, **gpu), 1.0)
    assert found(make("mine")).runs == ("other",)


def test_run_of_format_1_is_compared_like_any_other(tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2):
        folder = RunFolder(runs / f"old{seed}")
        training = format1.JOB["training"] | {"seed": seed}
        artifacts.write_json(folder.job, format1.JOB | {"training": training})
        EVENTS.append(folder.events, Started(time=seed, step=0, steps=60, parts=1))
        for step in range(1, 61):
            METRICS.append(folder.metrics, step_record(step, 7.0, tokens=512 * step))
    mine = TrainingJob.model_validate(format1.JOB).replace(run_dir=runs / "new")
    assert found(mine).runs == ("old1", "old2")


def test_each_seed_counts_once_with_its_longest_run(make):
    train(make("whole", seed=1), 1.0)
    train(make("stopped", seed=1), 2.0, to=50)
    train(make("other", seed=2), 3.0)
    train(make("newer", seed=2), 4.0)
    assert found(make("mine")).runs == ("whole", "newer")


def test_run_that_stopped_early_counts_up_to_its_last_window(job, make):
    train(make("stopped", seed=4), 4.0, 0.4, to=104)
    own, mean, _ = found(job).expected(losses())
    assert mean - own == pytest.approx([0.4 / 4] * 10 + [0.0] * 10)


def test_later_runs_and_the_run_itself_are_left_out(job, make):
    train(job, 4.0)
    train(make("later", seed=4), 5.0, 5.0)
    assert found(job).runs == ("high", "low", "usual")


def test_run_that_was_extended_has_another_schedule(job, make):
    extended = make("extended", seed=4)
    train(extended, 4.0, to=100, of=100)
    train(extended, 5.0)
    assert found(job).runs == ("high", "low", "usual")
    assert band.find(extended) is None


def test_run_that_diverged_is_not_used(job):
    bad = job.folder.cache.run("low")
    assert found(job).runs == ("high", "low", "usual")
    EVENTS.append(bad.events, Failed(message="step 9 has loss nan", reason="diverged"))
    assert found(job).runs == ("high", "usual")


def test_damaged_run_is_ignored(job, make):
    for name, file, content in (
        ("cut", "job.json", '{"run_dir":'),
        ("old", "job.json", '{"of": "another version"}'),
        ("bytes", "metrics.jsonl", "\xff\n"),
        ("list", "metrics.jsonl", "[]\n"),
        ("nameless", "metrics.jsonl", '{"loss": 3.0}\n'),
    ):
        folder = make(name, seed=9).run_dir
        train(TrainingJob.read(folder / "job.json"), 1.0)
        (folder / file).write_bytes(content.encode("latin-1"))
    make("never begun", seed=10)
    assert found(job).runs == ("high", "low", "usual")


def test_warning_that_the_loss_left_the_band_is_logged_once(job, monkeypatch, caplog):
    minutes = itertools.count(1)
    monkeypatch.setattr(time, "monotonic", lambda: 61.0 * next(minutes))
    shown: list[Path] = []
    told: list[str] = []
    watch = LossWatch(job, shown.append, told.append)
    for record in losses(1.0, since=60):
        METRICS.append(job.folder.metrics, record)
        if record.step % 30 == 0:
            watch(Metrics(record=record))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1
    assert said[0].startswith("loss is out of band from 3,840 tokens: up to 0.35")
    assert told == said
    assert shown == [job.run_dir / "loss.png"] * 7
    assert shown[0].read_bytes().startswith(b"\x89PNG")


def test_run_of_less_than_a_minute_is_compared_at_its_end(job):
    told: list[str] = []
    watch = LossWatch(job, lambda plot: None, told.append)
    for record in losses(1.0, since=60):
        METRICS.append(job.folder.metrics, record)
        watch(Metrics(record=record))
    assert not told
    watch(Done())
    watch(Done())
    assert [text.split(":")[0] for text in told] == ["loss is out of band from 3,840 tokens"]


def test_plot_without_a_band_is_drawn_as_well(make):
    train(make("other", seed=1), 1.0)
    mine = make("mine")
    for expected in (None, found(mine)):
        plot = loss_curve(mine, list(losses(to=3)), expected)
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert imread(plot)[..., 3].min() == 1, "on a dark page it brings its own background"


def test_band_of_runs_too_short_for_each_window_is_drawn_in_one_piece(job, figures):
    """Of a run that logs every 15 steps, every third window of ten has no logged step."""
    sparse = [x for x in losses() if isinstance(x, StepRecord) and x.step % 15 in (0, 1)]
    loss_curve(job, [validation_record(0, 6.0), *sparse], found(job))
    [axes] = figures[0].axes
    assert not any(math.isnan(y) for line in axes.lines for y in line.get_ydata())
    [filled] = axes.collections
    assert len(filled.get_paths()) == 1

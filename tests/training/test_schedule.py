from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zeroflow.training.schedule import Earlier, Schedule, ScheduleName, decays


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 400))
    return Schedule(
        name=draw(st.sampled_from(get_args(ScheduleName))),
        peak=draw(st.floats(1e-6, 1)),
        warmup_steps=draw(st.integers(0, steps - 1)),
        steps=steps,
    )


def rates(schedule: Schedule) -> list[float]:
    return [schedule.learning_rate(step) for step in range(schedule.steps)]


@given(schedules())
def test_every_rate_is_positive_and_the_peak_is_reached_but_not_exceeded(schedule):
    values = rates(schedule)
    # one rounding of the product and one of the quotient in fp64
    assert all(0 < value <= schedule.peak * (1 + 1e-15) for value in values)
    assert values[schedule.warmup_steps] == pytest.approx(schedule.peak, rel=1e-12)  # a cosine


@given(schedules())
def test_warm_up_is_linear_and_later_rates_never_rise(schedule):
    values, warmup = rates(schedule), schedule.warmup_steps
    for step, value in enumerate(values[:warmup]):
        assert value == pytest.approx(schedule.peak * (step + 1) / warmup)
    assert all(a >= b for a, b in pairwise(values[warmup:]))


@pytest.mark.parametrize(("name", "last"), [("cosine", 1e-4), ("wsd", 1e-2)])
def test_decay_ends_near_zero(name, last):
    schedule = Schedule(name=name, peak=1.0, warmup_steps=20, steps=1000)
    assert 0 < rates(schedule)[-1] < last
    assert schedule.learning_rate(schedule.steps) == 0


def test_cosine_is_halfway_down_in_the_middle():
    schedule = Schedule(name="cosine", peak=2.0, warmup_steps=100, steps=300)
    assert schedule.learning_rate(200) == pytest.approx(1.0)


def test_wsd_is_constant_then_linear_over_the_last_fifth():
    schedule = Schedule(name="wsd", peak=3.0, warmup_steps=10, steps=1000)
    values = rates(schedule)
    assert set(values[10:801]) == {3.0}
    for step in range(800, 1000):
        assert values[step] == pytest.approx(3.0 * (1000 - step) / 200)


@st.composite
def extended_schedules(draw: st.DrawFn) -> Schedule:
    before = draw(schedules())
    since = draw(st.integers(1, before.steps))
    steps = before.steps + draw(st.integers(1, 400))
    return before.replace(steps=steps, before=Earlier(schedule=before, steps=since))


@given(extended_schedules())
def test_extended_schedule_keeps_earlier_rates_and_joins_the_new_ones_without_a_jump(schedule):
    before, plain = schedule.before, schedule.replace(before=None)
    values, since = rates(schedule), before.steps
    assert values[:since] == rates(before.schedule)[:since]
    if since < schedule.warmup_steps:
        assert values == rates(plain)
        return
    warm = since + schedule.warmup_steps
    assert values[warm:] == rates(plain)[warm:]
    assert all(value > 0 for value in values)
    if schedule.warmup_steps:
        most = schedule.peak / schedule.warmup_steps
        # also where the second decay falls while the rate still rises
        rises = [b - a for a, b in pairwise(values[since - 1 : warm + 1])]
        assert all(rise <= most * (1 + 1e-9) for rise in rises)


def test_wsd_that_is_extended_before_its_decay_does_not_change_its_rate():
    before = Schedule(name="wsd", peak=3.0, warmup_steps=10, steps=100)
    later = before.replace(steps=200, before=Earlier(schedule=before, steps=80))
    assert rates(later) == rates(before.replace(steps=200))


def test_schedule_that_was_not_extended_is_stored_as_before():
    plain = Schedule(name="cosine", peak=1.0, warmup_steps=1, steps=9)
    assert plain.model_dump() == {"name": "cosine", "peak": 1.0, "warmup_steps": 1, "steps": 9}
    later = plain.replace(steps=20, before=Earlier(schedule=plain, steps=9))
    again = later.replace(steps=30, before=Earlier(schedule=later, steps=20))
    assert Schedule.model_validate_json(again.model_dump_json()) == again
    assert rates(again)[:20] == rates(later)


def test_help_describes_every_schedule():
    for name in get_args(ScheduleName):
        assert f" {name}: " in decays()


@pytest.mark.parametrize("warmup_steps", [10, 11])
def test_warm_up_that_leaves_no_step_is_refused(warmup_steps):
    with pytest.raises(ValidationError, match=f"--warmup-steps {warmup_steps} leaves none of 10"):
        Schedule(name="cosine", peak=1.0, warmup_steps=warmup_steps, steps=10)

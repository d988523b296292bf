import random

from zeroflow.training.health import Monitor, Reading


def curve(steps: int, *, seed: int = 0) -> list[Reading]:
    """A healthy training: a fast drop, then a slow one, with noise."""
    rng = random.Random(seed)
    return [
        Reading(
            loss=2 + 8 / (1 + 0.3 * step) + rng.gauss(0, 0.05),
            grad_norm=1 + 3 / (1 + step) + rng.gauss(0, 0.1),
            update_ratio=2e-3,
            first_epoch=True,
        )
        for step in range(steps)
    ]


def alarms(readings: list[Reading], *, entropy: float | None = None) -> dict[int, list[str]]:
    monitor = Monitor(entropy=entropy)
    found = {step: monitor.alarms(reading) for step, reading in enumerate(readings)}
    return {step: words for step, words in found.items() if words}


def test_healthy_training_raises_no_alarm():
    for seed in range(20):
        assert alarms(curve(300, seed=seed)) == {}


def test_jump_of_the_loss_raises_an_alarm_at_its_step():
    readings = curve(200)
    readings[150] = readings[150]._replace(loss=readings[150].loss + 2)
    [(step, [words])] = alarms(readings).items()
    assert step == 150 and words.startswith("loss 4.")


def test_exploding_gradient_raises_an_alarm_at_its_step():
    readings = curve(200)
    readings[150] = readings[150]._replace(grad_norm=50.0)
    [(step, [words])] = alarms(readings).items()
    assert step == 150 and "gradient norm 50" in words


def test_too_large_update_raises_an_alarm_before_the_window_can_detect_it():
    readings = curve(200)
    readings[12] = readings[12]._replace(update_ratio=0.4)
    assert alarms(readings) == {12: ["an update of 40% of a matrix's norm"]}


def test_updates_that_are_always_large_are_no_alarm():
    small = [reading._replace(update_ratio=0.08 + 0.001 * i) for i, reading in enumerate(curve(60))]
    assert alarms(small) == {}
    small[50] = small[50]._replace(update_ratio=0.4)
    assert alarms(small) == {50: ["an update of 40% of a matrix's norm"]}


def test_implausibly_low_loss_raises_an_alarm_in_the_first_epoch_only():
    leak = [reading._replace(loss=0.01) for reading in curve(3)]
    assert (
        all("implausibly low" in words[0] for words in alarms(leak).values())
        and len(alarms(leak)) == 3
    )
    assert alarms([reading._replace(first_epoch=False) for reading in leak]) == {}
    assert alarms([reading._replace(loss=0.2) for reading in leak], entropy=0.1) == {}


def test_monitor_of_a_resumed_run_knows_the_earlier_steps():
    readings = curve(200)
    readings[150] = readings[150]._replace(loss=9.0)
    resumed = Monitor(entropy=None, earlier=readings[:150])
    assert resumed.alarms(readings[150])

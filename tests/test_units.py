"""Quantities as text."""

import pytest

from zeroflow.units import binary, change, count, decimal, duration, parameter_count, speed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.6, "1 min"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (3601, "1 h 1 s"),
        (2 * 3600 + 10 * 60 + 59, "2 h 10 min"),
        (4 * 86400 + 3 * 3600 + 59 * 60, "4 d 3 h"),
        (100 * 86400, "100 d"),
    ],
)
def test_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


def test_parameters_of_any_size_have_a_text():
    assert parameter_count(317_649_024) == "317.6M" and parameter_count(34_976) == "34,976"


@pytest.mark.parametrize(
    ("size", "as_memory", "as_file"),
    [
        (600_000, "1 MiB", "0.6 MB"),
        (512 * 2**20, "512 MiB", "537 MB"),
        (2**30, "1.00 GiB", "1.07 GB"),
        (16_140_000_000, "15.03 GiB", "16.14 GB"),
        (1_234_000_000_000, "1149.25 GiB", "1,234.00 GB"),
    ],
)
def test_memory_is_in_powers_of_two_and_files_in_powers_of_ten(size, as_memory, as_file):
    assert (binary(size), decimal(size)) == (as_memory, as_file)


def test_speed_that_was_not_measured_is_unknown():
    assert speed(1_234_567.8) == "1,234,568 tokens/s"
    assert speed(None) == "unknown"


def test_counts_of_one_are_singular():
    assert [count(n, "row") for n in (0, 1, 2048)] == ["0 rows", "1 row", "2,048 rows"]
    assert [count(n, "try", "tries") for n in (1, 2)] == ["1 try", "2 tries"]


@pytest.mark.parametrize(
    ("share", "text"),
    [(-0.663, "-66.3%"), (0, "+0.0%"), (1.376, "+137.6%"), (2, "3.0 times"), (87.2, "88 times")],
)
def test_large_change_is_a_number_of_times(share, text):
    assert change(share) == text

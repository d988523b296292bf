import pytest
import torch
from tiny import MODEL

from zeroflow import planning
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.planning import Device

H200 = Device(kind="cuda", name="NVIDIA H200", memory_bytes=140 * 2**30, peak_flops=989e12)
CPU = Device(kind="cpu", name="some CPU", memory_bytes=2**33)


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
    assert planning.duration(seconds) == text


def test_rate_on_a_known_gpu_is_a_share_of_its_peak():
    rate, source = planning.expected_tokens_per_second(MODEL, 128, H200)
    assert rate == pytest.approx(0.25 * 989e12 / MODEL.flops_per_token(128))
    assert "25%" in source


def test_unknown_peak_gives_no_rate_and_no_guess():
    unknown = Device(kind="cuda", name="Some New GPU", memory_bytes=2**40)
    rate, source = planning.expected_tokens_per_second(MODEL, 128, unknown)
    assert rate is None and "peak of Some New GPU is not known" in source


def test_rate_on_a_cpu_is_measured():
    rate, source = planning.expected_tokens_per_second(MODEL, 128, CPU)
    assert rate is not None and rate > 0 and "measured" in source


def test_cpu_is_found_without_a_peak():
    device = planning.find_device("cpu")
    assert device.kind == "cpu" and device.peak_flops is None and device.memory_bytes > 2**28


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_is_refused_where_there_is_none_and_not_asked_for_by_auto():
    assert planning.find_device("auto").kind == "cpu"
    with pytest.raises(ValueError, match="--device cuda, but PyTorch sees no GPU"):
        planning.find_device("cuda")


def micro_batch(size: str, gigabytes: int, *kind: str) -> tuple[int, str]:
    model = with_vocabulary(SIZES[size], 128_256)
    device = H200.replace(memory_bytes=gigabytes * 2**30)
    return planning.micro_batch(model, 2048, device, *kind)


def test_micro_batch_grows_with_memory_and_shrinks_with_the_model():
    rows = [micro_batch(size, 80)[0] for size in ("tiny", "small", "medium")]
    assert rows == sorted(rows, reverse=True) and rows[-1] > 1
    assert micro_batch("medium", 140)[0] > micro_batch("medium", 80)[0]


def test_activations_are_computed_again_where_they_would_not_fit():
    assert micro_batch("medium", 80)[1] == "none"
    assert micro_batch("medium", 24) == (1, "full"), "medium trains on a card of 24 GB"
    assert micro_batch("medium", 8) == (1, "full"), "a step of one row is always tried"
    rows = [micro_batch("small", 24, kind)[0] for kind in ("none", "selective", "full")]
    assert rows == sorted(rows) and rows[0] < rows[-1], "more fits if asked for"


def test_checkpoint_holds_weights_and_two_moments_in_four_bytes_each():
    assert planning.checkpoint_bytes(MODEL) == 3 * 4 * MODEL.parameters

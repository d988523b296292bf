"""The choice of kernels."""

import logging
import math

import pytest
import torch
from tiny import WORKLOAD

from zeroflow.device import known_gpu
from zeroflow.model.sizes import SIZES, with_vocabulary
from zeroflow.training import kernels
from zeroflow.training.kernels import KernelChoice, Kernels, fastest


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({"cudnn": 2.0, "flash": 3.0, "flash4": 1.8}, "flash4"),
        ({"cudnn": 2.0, "flash": 1.5, "flash4": 1.8}, "flash"),
        ({"cudnn": 2.0, "flash": 1.99}, "cudnn"),  # within the noise
        ({"cudnn": 2.0, "flash4": None}, "cudnn"),  # it failed
        ({"flash": 2.0}, "flash"),
    ],
)
def test_fastest_kernel_is_chosen_unless_the_difference_is_noise(milliseconds, expected):
    assert fastest(milliseconds) == expected


def test_cpu_has_no_choice_and_measures_nothing(tmp_path):
    assert kernels.choose(WORKLOAD, tmp_path, z_loss=0.0) == Kernels()
    assert not list(tmp_path.iterdir())


def test_choice_is_read_back_as_it_was_written(tmp_path):
    choice = KernelChoice(
        kernels=Kernels(attention="flash"),
        milliseconds={"attention": {"cudnn": 2.0, "flash": 1.5}, "loss": {"chunks": 3.0}},
    )
    choice.write(tmp_path / "kernels.json")
    assert KernelChoice.read(tmp_path / "kernels.json") == choice


def test_difference_is_that_of_the_worst_result_and_infinite_if_one_is_nan():
    good, off = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.5])
    assert kernels.largest_difference([good, off], [good, good]) == pytest.approx(0.25)
    assert kernels.largest_difference([good, good * math.nan], [good, good]) == math.inf


def test_determinism_is_not_free_where_its_kernels_are_missing(monkeypatch):
    hopper, ampere = known_gpu("H200"), known_gpu("L4")
    small = WORKLOAD.replace(model=with_vocabulary(SIZES["small"], 256), precision="bf16")
    assert kernels.determinism_is_free(small, hopper) == kernels.has_extra()
    monkeypatch.setattr(kernels, "has_extra", lambda: True)  # of packages for GPUs only
    assert kernels.determinism_is_free(small, hopper)
    assert not kernels.determinism_is_free(small, ampere)
    tiny = small.replace(model=with_vocabulary(SIZES["tiny"], 256))
    assert not kernels.determinism_is_free(tiny, hopper), "heads of 32"
    for change in ({"fp8": True}, {"document_mask": True}):
        assert not kernels.determinism_is_free(small.replace(**change), hopper)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_second_choice_for_a_shape_is_read_instead_of_measured(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    work = WORKLOAD.replace(device="cuda", precision="bf16")
    first = kernels.choose(work, tmp_path, z_loss=0.0)
    assert "were measured in" in caplog.text
    caplog.clear()
    assert kernels.choose(work, tmp_path, z_loss=0.0) == first
    assert "were measured in" not in caplog.text and "attention: " in caplog.text
    assert len(list(tmp_path.iterdir())) == 1
    kernels.choose(work.replace(deterministic=True), tmp_path, z_loss=0.0)
    assert len(list(tmp_path.iterdir())) == 2, "a deterministic run has its own choice"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernel_with_wrong_gradients_is_not_chosen(caplog):
    x = torch.ones(8, device="cuda", requires_grad=True)
    slow = {"separate": lambda: x.sin().cos().sin().cos().sin()}
    wrong = {"fused": lambda: slow["separate"]().detach() + 0 * x}
    chosen = kernels.measure([kernels.Contest("feed_forward", slow | wrong, (x,))])
    assert chosen.kernels.feed_forward == "separate"
    assert chosen.milliseconds["feed_forward"]["fused"] is None
    assert "its results differ from the default's by 1" in caplog.text

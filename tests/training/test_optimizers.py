"""Every optimiser of the package, found as the program finds them."""

import json

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from tiny import MODEL, RandomBatches, training_config

from zeroflow.model.llama import Llama
from zeroflow.training.loop import train
from zeroflow.training.optimizers.base import OptimizerConfig
from zeroflow.training.optimizers.choice import OPTIMIZERS, AnyOptimizer
from zeroflow.training.state import TrainState, new_state

SETTINGS = TypeAdapter(AnyOptimizer)


@pytest.fixture(params=OPTIMIZERS)
def config(request) -> OptimizerConfig:
    return OPTIMIZERS[request.param]()


def trained(config: OptimizerConfig, steps: int = 3) -> TrainState:
    settings = training_config(steps=steps, optimizer=config)
    state = new_state(settings)
    for _ in train(state, RandomBatches(), settings):
        pass
    return state


def bits(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of everything that a step of the optimiser may change."""
    return {
        f"{name} {key}": value.detach().clone()
        for name, parameter in state.model.named_parameters()
        for key, value in {"weight": parameter, **state.optimizer.state[parameter]}.items()
    }


def test_settings_are_read_as_the_class_that_they_name(config):
    for written in (config.model_dump(mode="json"), json.loads(config.model_dump_json()), config):
        assert SETTINGS.validate_python(written) == config
    assert type(SETTINGS.validate_python({"name": config.name})) is type(config)


def test_setting_of_another_optimiser_is_refused(config):
    with pytest.raises(
        ValidationError, match=f"--tau has no effect with --optimizer {config.name}"
    ):
        SETTINGS.validate_python({"name": config.name, "tau": 1.0})


def test_unknown_optimiser_is_refused_and_the_known_ones_are_named(config):
    with pytest.raises(ValidationError, match=f"'{config.name}'"):
        SETTINGS.validate_python({"name": "sgdd"})


def test_state_is_allocated_before_the_first_step_and_as_large_as_planned(config):
    state = new_state(training_config(optimizer=config))
    kept = bits(state).items()
    planned = [value for name, value in kept if value.dim() and not name.endswith(" weight")]
    assert sum(value.nbytes for value in planned) == config.state_bytes(MODEL)
    after = bits(trained(config))
    assert {name: value.shape for name, value in kept} == {n: v.shape for n, v in after.items()}


def test_learning_rate_is_set_for_every_parameter(config):
    optimizer = config.build(Llama(MODEL), 1e-3)
    config.set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_skipped_step_leaves_every_bit_as_it_was(config, gradient):
    state = trained(config)
    before = bits(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    config.step(state.optimizer, skip=torch.tensor(True))
    for name, value in bits(state).items():
        assert torch.equal(value, before[name]), name
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    config.step(state.optimizer, skip=torch.tensor(False))
    after = bits(state)
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert len(changed) == len(after)


def test_update_ratio_is_that_of_the_update_that_was_made(config):
    if "weight_decay" in type(config).model_fields:
        config = config.replace(weight_decay=0.0)  # its update is not counted
    settings = training_config(optimizer=config)
    state = new_state(settings)
    steps = train(state, RandomBatches(), settings)
    next(steps), next(steps)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    next(steps)
    ratios = [
        float((p.detach() - before[name]).norm() / p.detach().norm())
        for name, p in state.model.named_parameters()
        if p.dim() == 2 and "embed" not in name
    ]
    # the difference of two nearly equal weights has fewer digits
    assert float(config.update_ratio(state.optimizer)) == pytest.approx(max(ratios), rel=1e-3)


def test_only_parameters_with_gradients_have_moved(config):
    state = new_state(training_config(optimizer=config))
    reached, *others = state.model.parameters()
    before = {p: p.detach().clone() for p in state.model.parameters()}
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    reached.grad = torch.ones_like(reached)
    config.step(state.optimizer, skip=torch.tensor(False))
    assert config.has_moved(state.optimizer, reached, before[reached])
    for parameter in others:  # of which some have decayed
        assert not config.has_moved(state.optimizer, parameter, before[parameter])

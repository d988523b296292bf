from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import DEVICES, MODEL, NO_END, RandomBatches, training_config, with_workload

from zeroflow.data.batches import MicroBatch, to_micro_batch
from zeroflow.training.loop import loss_sum, train, train_step
from zeroflow.training.state import new_state

EIGHT_ROWS = RandomBatches(rows=8).micro_batches(0)


def split(batch: MicroBatch, rows: int) -> list[MicroBatch]:
    return [
        MicroBatch(inputs, targets, targets.numel())
        for inputs, targets in zip(batch.inputs.split(rows), batch.targets.split(rows), strict=True)
    ]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_accumulated_micro_batches_equal_the_whole_batch(rows):
    config = training_config()
    whole, parts = new_state(config), new_state(config)
    expected = train_step(whole, EIGHT_ROWS, config)
    metrics = train_step(parts, split(EIGHT_ROWS[0], rows), config)
    # the same terms summed in another order, in fp32
    torch.testing.assert_close(metrics.loss, expected.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics.grad_norm, expected.grad_norm, atol=1e-6, rtol=1e-5)
    for (name, mine), theirs in zip(
        parts.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        # the first moment after a step: a tenth of the gradient, whose entries are near 1e-2
        torch.testing.assert_close(
            parts.optimizer.state[mine]["exp_avg"],
            whole.optimizer.state[theirs]["exp_avg"],
            atol=1e-7,
            rtol=1e-4,
            msg=name,
        )


def test_loss_is_the_mean_over_the_tokens_of_the_step():
    state = new_state(training_config())
    inputs, targets, *_ = EIGHT_ROWS[0]
    expected = F.cross_entropy(state.model(inputs).flatten(0, 1), targets.flatten()).item()
    loss = train_step(state, split(EIGHT_ROWS[0], 2), training_config()).loss.item()
    assert loss == pytest.approx(expected, abs=1e-6)  # another order of the sum


def test_padding_counts_neither_in_the_loss_nor_in_its_mean():
    rows = torch.randint(1, MODEL.vocab_size, (4, 13), generator=torch.Generator().manual_seed(5))
    rows[:, -1] = 0  # the end of text
    padded = torch.cat([rows, torch.zeros(4, 6, dtype=rows.dtype)], dim=1)
    states = []
    for tokens in (rows, padded):
        states.append(new_state(training_config()))
        batch = to_micro_batch(tokens.numpy(), end_of_text=0)
        assert batch.valid == 48
        states.append(train_step(states[-1], [batch], training_config()))
    plain, metrics, with_padding, padded_metrics = states
    # attention over more columns sums in another order, in fp32
    torch.testing.assert_close(padded_metrics.loss, metrics.loss, atol=1e-6, rtol=0)
    for mine, theirs in zip(with_padding.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(
            with_padding.optimizer.state[mine]["exp_avg"],
            plain.optimizer.state[theirs]["exp_avg"],
            atol=1e-7,
            rtol=1e-4,
        )


def test_gradients_above_the_limit_are_scaled_down_to_it():
    config = training_config()
    limit = 0.01
    optimizer = config.workload.optimizer.replace(max_grad_norm=limit, beta1=0.5)
    clipped = with_workload(config, optimizer=optimizer)
    state = new_state(clipped)
    metrics = train_step(state, EIGHT_ROWS, clipped)
    assert metrics.grad_norm > 10 * limit
    moments = [state.optimizer.state[p]["exp_avg"].flatten() for p in state.model.parameters()]
    # half of the clipped gradient; clipping adds 1e-6 to the norm it divides by
    assert float(torch.cat(moments).norm()) == pytest.approx(limit / 2, rel=1e-3)


def test_training_yields_after_each_step_at_the_scheduled_rate():
    config = training_config(steps=5)
    state = new_state(config)
    seen = []
    for metrics in train(state, RandomBatches(), config):
        seen.append((state.step, metrics.learning_rate))
        assert all(group["lr"] == metrics.learning_rate for group in state.optimizer.param_groups)
    assert seen == [(step + 1, config.schedule.learning_rate(step)) for step in range(5)]
    assert not list(train(state, RandomBatches(), config)), "at the end there is nothing to do"


def test_random_numbers_restart_from_the_seed():
    torch.seed()  # as in a new process: a different seed every time
    new_state(training_config(seed=3))
    drawn = torch.rand(4)
    torch.seed()
    new_state(training_config(seed=3))
    assert torch.equal(torch.rand(4), drawn)


def test_same_seed_trains_the_same_bit_for_bit():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        config = training_config(seed=seed)
        state = new_state(config)
        for _ in train(state, RandomBatches(), config):
            pass
        return state.model.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_bf16_keeps_weights_moments_and_loss_in_fp32():
    config = training_config(precision="bf16")
    state = new_state(config)
    exact = train_step(new_state(training_config()), EIGHT_ROWS, training_config()).loss
    loss = train_step(state, EIGHT_ROWS, config).loss
    assert loss.dtype == torch.float32
    assert loss != exact
    # 8 bits of mantissa, averaged over 96 tokens, at a loss of 5.5
    assert float(loss) == pytest.approx(float(exact), abs=0.02)
    for parameter in state.model.parameters():
        assert parameter.dtype == torch.float32
        assert state.optimizer.state[parameter]["exp_avg"].dtype == torch.float32


class Poisoned(RandomBatches):
    """The loss of step 2 is NaN for any weights."""

    def micro_batches(self, step):
        batches = super().micro_batches(step)
        return [batch._replace(valid=0 if step == 2 else batch.valid) for batch in batches]


def test_non_finite_update_is_skipped_and_counted():
    config = training_config(steps=6)
    state = new_state(config)
    counts, before = [], {}
    for metrics in train(state, Poisoned(), config):
        if state.step == 3:
            assert not metrics.loss.isfinite()
            for name, weight in state.model.state_dict().items():
                assert torch.equal(weight, before[name]), name
        else:
            assert metrics.loss.isfinite()
        before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
        counts.append(state.skipped.tolist())
    assert counts == [[0, 0], [0, 0], [1, 1], [0, 1], [0, 1], [0, 1]]
    steps = {int(moments["step"]) for moments in state.optimizer.state.values()}
    assert steps == {5}, "bias correction counts the updates that were made"


@pytest.mark.parametrize("fp8", [False, True])
def test_recomputed_activations_give_the_same_bits(fp8):
    def weights(kind: str) -> dict[str, torch.Tensor]:
        config = training_config(activation_checkpointing=kind, fp8=fp8)
        state = new_state(config)
        for _ in train(state, RandomBatches(), config):
            pass
        return state.model.state_dict()

    kept = weights("none")
    for kind in ("selective", "full"):
        again = weights(kind)
        assert kept.keys() == again.keys()
        assert all(torch.equal(kept[name], again[name]) for name in kept), kind


def saved_bytes(kind: str) -> int:
    """Bytes that one micro-batch keeps for its backward pass, without the weights."""
    config = training_config(activation_checkpointing=kind)
    state = new_state(config)
    weights = {parameter.data_ptr() for parameter in state.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_sum(state.model, EIGHT_ROWS[0])
    return sum(kept.values())


def test_more_recomputation_keeps_less_memory():
    assert saved_bytes("none") > 1.3 * saved_bytes("selective") > 1.3 * saved_bytes("full")


def documents(*lengths: int) -> torch.Tensor:
    return torch.tensor([[number for number, n in enumerate(lengths) for _ in range(n)]])


def default(device: str) -> dict[str, Any]:
    """Settings that a run on the device has by default."""
    gpu = device == "cuda"
    return {"device": device, "precision": "bf16" if gpu else "fp32", "compile": gpu}


WAYS = [
    default("cpu"),
    *(
        pytest.param(
            {"device": "cuda", "precision": precision, "compile": compiled},
            id=f"cuda-{precision}-{'compiled' if compiled else 'eager'}",
            marks=DEVICES[1].marks,
        )
        for precision in ("bf16", "fp32")
        for compiled in (True, False)
    ),
]
"""The defaults of a CPU and a GPU, and what older GPUs are limited to."""

WIDE = MODEL.replace(hidden_size=128, intermediate_size=256)  # heads as wide as a GPU's kernels ask
PLAIN = training_config(model=WIDE)


@pytest.mark.parametrize("way", WAYS)
def test_nothing_leaks_from_one_document_into_another(way):
    config = training_config(model=WIDE, document_mask=True, **way)
    model, device = new_state(config).model, config.workload.device
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    generator = torch.Generator().manual_seed(0)
    lengths = (100, 1, 27, 172)
    numbers = documents(*lengths).to(device)
    before = torch.randint(256, (1, sum(lengths)), generator=generator).to(device)
    for changed, length in enumerate(lengths):
        begin = sum(lengths[:changed])
        after = before.clone()
        after[:, begin : begin + length] = (after[:, begin : begin + length] + 7) % 256
        moved = (model(before, None, numbers) != model(after, None, numbers)).any(-1)
        assert moved[0].tolist() == (numbers[0] == changed).tolist()

    # nor in the backward pass
    hidden: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: hidden.append(output) or output.retain_grad()
    )
    model(before, None, numbers)[:, 101:128].float().square().sum().backward()
    reached = hidden[0].grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == (numbers[0] == 2).tolist()


def test_document_in_a_row_gives_the_same_results_as_alone():
    model = new_state(training_config()).model
    tokens = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(0))
    together = model(tokens, None, documents(5, 12, 13))
    alone = [model(part) for part in tokens.split([5, 12, 13], dim=1)]
    # the same sums over more columns, whose weight is 0
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_step_is_that_of_plain_code_in_fp32(way):
    """The oracle is eager fp32 on the CPU, masked and not."""
    for masked in (False, True):
        rows = np.random.default_rng(0).integers(256, size=(4, 129))
        rows[:, ::40] = 0
        batch = to_micro_batch(rows, end_of_text=0, document_mask=masked)
        config = training_config(model=WIDE, document_mask=masked, **way)
        state, plain = new_state(config), new_state(PLAIN)
        loss = train_step(state, [batch], config)
        expected = train_step(plain, [batch], PLAIN)
        # bf16 has 8 bits of mantissa; a loss of 5.5 is a mean over hundreds of tokens
        assert float(loss.loss) == pytest.approx(float(expected.loss), rel=1e-3)
        assert float(loss.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-2)
        for (name, mine), theirs in zip(
            state.model.named_parameters(), plain.model.parameters(), strict=True
        ):
            gradient = state.optimizer.state[mine]["exp_avg"].cpu()
            wanted = plain.optimizer.state[theirs]["exp_avg"]
            assert (gradient - wanted).norm() < 3e-2 * wanted.norm(), name


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_gpu_never_writes_all_scores_to_memory(way, masked):
    torch.compiler.reset()  # after some shapes of the same code PyTorch no longer compiles it
    model = MODEL.replace(hidden_size=256, num_attention_heads=8, num_hidden_layers=1)
    config = training_config(model=model, document_mask=masked, **way)
    rows = np.random.default_rng(0).integers(256, size=(4, 4097))
    batch = to_micro_batch(rows, end_of_text=0, document_mask=masked)
    state = new_state(config)
    train_step(state, [batch], config)  # compiles
    torch.cuda.reset_peak_memory_stats()
    train_step(state, [batch], config)
    scores = 4 * 8 * 4096**2 * config.workload.dtype.itemsize
    assert torch.cuda.max_memory_allocated() < scores / 2


FP8 = {"precision": "bf16", "fp8": True}


@pytest.mark.parametrize("device", DEVICES)
def test_step_in_fp8_gives_every_parameter_nearly_the_gradient_of_fp32(device):
    rows = np.random.default_rng(0).integers(256, size=(4, 129))
    batch = to_micro_batch(rows, end_of_text=NO_END)
    config = training_config(model=WIDE, **default(device) | FP8)
    state, plain = new_state(config), new_state(PLAIN)
    loss = train_step(state, [batch], config)
    expected = train_step(plain, [batch], PLAIN)
    # a loss of 5.5 is a mean over hundreds of tokens, whose roundings cancel out
    assert float(loss.loss) == pytest.approx(float(expected.loss), rel=1e-3)
    for (name, mine), theirs in zip(
        state.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        gradient = state.optimizer.state[mine]["exp_avg"].cpu()
        wanted = plain.optimizer.state[theirs]["exp_avg"]
        # four products between the loss and the first block, each off by 6 % (test_fp8.py), and
        # their inputs by 4 %
        assert 0 < (gradient - wanted).norm() < 0.2 * wanted.norm(), name


@pytest.mark.parametrize("device", DEVICES)
def test_training_in_fp8_learns_as_in_bf16(device):
    def losses(**how) -> list[float]:
        config = training_config(steps=80, peak=3e-3, model=WIDE, **default(device) | how)
        state, batches = new_state(config), Counting()
        return [metrics.loss.item() for metrics in train(state, batches, config)]

    bf16, fp8 = losses(precision="bf16"), losses(**FP8)
    assert fp8 != bf16
    # both come near the least possible, ln 2, of ln 256; a product that went wrong would not
    assert np.mean(bf16[-10:]) < 1
    assert np.mean(fp8[-10:]) == pytest.approx(np.mean(bf16[-10:]), abs=0.02)


class Counting(RandomBatches):
    """Rows that count up from a random number, by one or by two."""

    def micro_batches(self, step):
        random = np.random.default_rng(step)
        begins, steps = random.integers(64, size=(8, 1)), random.integers(1, 3, size=(8, 17))
        return [to_micro_batch((begins + steps.cumsum(axis=1)) % 64, end_of_text=NO_END)]


def test_fp8_changes_nothing_in_a_checkpoint_and_only_products_of_blocks():
    mine = new_state(training_config(**FP8)).model
    plain = new_state(training_config()).model
    assert mine.state_dict().keys() == plain.state_dict().keys()
    bf16 = new_state(training_config(precision="bf16")).model
    for model in (mine, bf16):
        del model.model.layers[:]
    tokens = EIGHT_ROWS[0].inputs
    assert torch.equal(mine(tokens), bf16(tokens)), "without blocks it is the same"

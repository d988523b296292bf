"""Defaults that depend on the model's size and the device."""

import math

from zeroflow.data.batches import largest_divisor
from zeroflow.device import Device
from zeroflow.estimate.memory import largest_micro_batch
from zeroflow.model.sizes import NOMINAL_VOCABULARY, nearest_size, with_vocabulary
from zeroflow.settings.run_config import RunConfig, TrainingChoice, of_workload
from zeroflow.settings.settled import SettledTraining
from zeroflow.training import kernels
from zeroflow.training.workload import Workload
from zeroflow.units import count

TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter, as in Hoffmann et al. 2022: https://arxiv.org/abs/2203.15556"""

CONTINUED = 0.1
"""Factor of the peak learning rate of a run that starts from a trained model. Continued
pre-training begins at about the lowest rate of the first one, usually a tenth of its peak: Parmar
et al. 2024, https://arxiv.org/abs/2407.07263. At a higher rate, a model learns the new text faster
and loses more of the old: docs/how-to/continue.md has an example."""

_CPU_BATCH_TOKENS = 512
"""Tokens of a step on a CPU, few because a CPU is slow."""

_CPU_STEPS = 200
"""Steps of a run on a CPU: with this batch, tiny takes a few minutes on two cores."""


def nominal_workload(run: RunConfig, device: Device) -> Workload:
    """Return the workload of one row with the nominal vocabulary and the defaults of the device.

    The vocabulary is nominal so that defaults do not depend on the tokenizer, which may not be
    known yet.
    """
    choice = run.training
    work = run.workload(
        with_vocabulary(run.model.shape, NOMINAL_VOCABULARY),
        device,
        seq_len=choice.seq_len or (2048 if device.kind == "cuda" else 256),
        precision=choice.precision or ("bf16" if device.has_bf16 else "fp32"),
        compile=device.compiles if choice.compile is None else choice.compile,
        micro_batch_rows=1,
        accumulate=1,
    )
    if choice.deterministic is not None:
        return work
    return work.replace(deterministic=kernels.determinism_is_free(work, device))


def validate_every(steps: int, *, gpu: bool) -> int:
    return 250 if gpu else max(1, steps // 2)


def checkpoint_every(steps: int) -> int:
    return max(1, min(250, steps // 5))


def log_interval(*, gpu: bool) -> int:
    return 10 if gpu else 5


def fill(run: RunConfig, device: Device) -> SettledTraining:
    """Return the training settings of `run`, with a default for every value that is None.

    Raises:
        ValueError: the numbers of rows and tokens in a step contradict each other.
    """
    choice, gpu = run.training, device.kind == "cuda"
    nominal = nominal_workload(run, device)
    fits, checkpointing = largest_micro_batch(nominal, device, choice.activation_checkpointing)
    size = nearest_size(run.model.shape)
    usual_tokens = size.batch_tokens if gpu else _CPU_BATCH_TOKENS
    rows, accumulate = _split(choice, nominal, fits, usual_tokens)
    batch = {"micro_batch_rows": rows, "accumulate": accumulate}
    work = nominal.replace(**batch, activation_checkpointing=checkpointing)
    budget = TOKENS_PER_PARAMETER * work.model.parameters
    steps = choice.max_steps or (-(-budget // work.batch_tokens) if gpu else _CPU_STEPS)
    # A third on a CPU, because batches are small: after 200 steps of 512 tokens on the sample, tiny
    # had a loss of 7.65 at 3e-3, and of 7.14 at 1e-3
    peak = size.learning_rate / (1 if gpu else 3)
    if run.model.init_from:
        peak *= CONTINUED
    warmup = max(round(0.02 * steps), min(10, steps // 10))
    prompt = "def" if run.data.data_mode == "sample" else "The"
    filled = {
        **of_workload(work),
        "batch_tokens": work.batch_tokens,
        "max_steps": steps,
        "learning_rate": choice.learning_rate or peak,
        "warmup_steps": warmup if choice.warmup_steps is None else choice.warmup_steps,
        "validation_tokens": choice.validation_tokens or (2**20 if gpu else 2**13),
        "validate_every": choice.validate_every or validate_every(steps, gpu=gpu),
        "checkpoint_every": choice.checkpoint_every or checkpoint_every(steps),
        "log_interval": choice.log_interval or log_interval(gpu=gpu),
        "sample_prompt": prompt if choice.sample_prompt is None else choice.sample_prompt,
    }
    given = {name: getattr(choice, name) for name in TrainingChoice.model_fields}
    return SettledTraining.model_validate(given | filled)


def _split(
    choice: TrainingChoice, nominal: Workload, fits: int, usual_tokens: int
) -> tuple[int, int]:
    """Return the rows of a micro-batch and the micro-batches of a step on each rank.

    Args:
        fits: maximum number of rows of a micro-batch that fit in memory.
        usual_tokens: default number of tokens of a step.
    """
    rows, accumulate = choice.batch_size, choice.grad_accum_steps
    if choice.batch_tokens is not None:
        wanted = _exact_rows(choice, nominal)
        return _exact_split(choice, wanted, fits)
    wanted = max(1, round(usual_tokens / nominal.seq_len / nominal.ranks))
    if rows and accumulate:
        return rows, accumulate
    if rows:
        return rows, max(1, round(wanted / rows))
    if accumulate:
        return max(1, min(fits, round(wanted / accumulate))), accumulate
    rows = largest_divisor(wanted, fits)
    if 4 * rows >= fits:
        return rows, wanted // rows
    # A micro-batch below a quarter of what fits would leave the GPU idle, so the default batch
    # changes by a few rows instead: 683 rows, a prime number, become 18 micro-batches of 38 rows
    accumulate = -(-wanted // fits)
    return round(wanted / accumulate), accumulate


def _exact_rows(choice: TrainingChoice, nominal: Workload) -> int:
    """Return the number of rows of a step on each rank that give exactly `batch_tokens`.

    Raises:
        ValueError: the numbers contradict each other; the message suggests one that fits.
    """
    tokens, seq_len, ranks = choice.batch_tokens, nominal.seq_len, nominal.ranks
    assert tokens is not None
    sizes = {"--batch-size": choice.batch_size, "--grad-accum-steps": choice.grad_accum_steps}
    given = {name: size for name, size in sizes.items() if size}
    unit = seq_len * ranks * math.prod(given.values())
    possible = unit if len(given) == 2 else max(1, tokens // unit) * unit
    if tokens == possible:
        return tokens // (seq_len * ranks)
    rows, rest = divmod(tokens, seq_len)
    if rest:
        raise ValueError(
            f"--batch-tokens {tokens} is not a multiple of --seq-len {seq_len}: use {possible}"
        )
    if rows % ranks:
        raise ValueError(
            f"{ranks} GPUs cannot share a step of {count(rows, 'row')} evenly: use a number of "
            f"GPUs that divides it, or, for a new run, --batch-tokens {possible}"
        )
    of_each = f" for each of {ranks} GPUs" if ranks > 1 else ""
    asked = " x ".join(f"{name} {size}" for name, size in given.items())
    raise ValueError(
        f"--batch-tokens {tokens} gives {count(rows // ranks, 'row')} of {seq_len}{of_each}, not "
        f"{asked}: drop one of them, or, for a new run, use --batch-tokens {possible}"
    )


def _exact_split(choice: TrainingChoice, wanted: int, fits: int) -> tuple[int, int]:
    """Return rows per micro-batch and micro-batches per step that give exactly `wanted` rows."""
    accumulate = choice.grad_accum_steps
    rows = choice.batch_size or (
        wanted // accumulate if accumulate else largest_divisor(wanted, fits)
    )
    return rows, wanted // rows

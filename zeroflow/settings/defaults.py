"""Defaults that depend on the model's size and the device."""

from zeroflow.data.batches import largest_divisor
from zeroflow.device import Device
from zeroflow.estimate.memory import largest_micro_batch
from zeroflow.model.sizes import NOMINAL_VOCABULARY, nearest_size, with_vocabulary
from zeroflow.settings.run_config import RunConfig, TrainingChoice
from zeroflow.settings.settled import SettledTraining
from zeroflow.training.workload import Workload

TOKENS_PER_PARAMETER = 20
"""Hoffmann et al. 2022: https://arxiv.org/abs/2203.15556"""


_CPU_BATCH_TOKENS = 512


_CPU_STEPS = 200


def nominal_workload(run: RunConfig, device: Device) -> Workload:
    """The workload of one row at the nominal vocabulary, with the defaults of the device."""
    choice = run.training
    return run.workload(
        with_vocabulary(run.model.shape, NOMINAL_VOCABULARY),
        device,
        ranks=choice.gpus or 1,
        zero_stage=choice.zero_stage or 0,
        seq_len=choice.seq_len or (2048 if device.kind == "cuda" else 256),
        precision=choice.precision or ("bf16" if device.has_bf16 else "fp32"),
        compile=device.compiles if choice.compile is None else choice.compile,
        micro_batch_rows=1,
        accumulate=1,
        activation_checkpointing="none",
    )


def fill(run: RunConfig, device: Device) -> SettledTraining:
    """The training of `run` with a default for every value that is None.

    Raises:
        ValueError: the numbers of rows and tokens in a step contradict each other.
    """
    choice, gpu = run.training, device.kind == "cuda"
    nominal = nominal_workload(run, device)
    size = nearest_size(run.model.shape)
    fits, checkpointing = largest_micro_batch(nominal, device, choice.activation_checkpointing)
    usual_tokens = size.batch_tokens if gpu else _CPU_BATCH_TOKENS
    batch_size, accumulate = _batch(choice, nominal.seq_len, fits, usual_tokens, nominal.ranks)
    batch_tokens = batch_size * accumulate * nominal.ranks * nominal.seq_len
    budget = TOKENS_PER_PARAMETER * nominal.model.parameters
    steps = choice.max_steps or (-(-budget // batch_tokens) if gpu else _CPU_STEPS)
    # tiny on the sample at 512 tokens a step: 7.65 after 200 steps at 3e-3, 7.14 at 1e-3
    peak = size.learning_rate / (1 if gpu else 3)
    warmup = max(round(0.02 * steps), min(10, steps // 10))
    prompt = "def " if run.data.data_mode == "sample" else "The "
    filled = {
        "gpus": nominal.ranks,
        "zero_stage": nominal.zero_stage,
        "seq_len": nominal.seq_len,
        "batch_size": batch_size,
        "grad_accum_steps": accumulate,
        "batch_tokens": batch_tokens,
        "max_steps": steps,
        "learning_rate": choice.learning_rate or peak,
        "warmup_steps": warmup if choice.warmup_steps is None else choice.warmup_steps,
        "precision": nominal.precision,
        "compile": nominal.compile,
        "activation_checkpointing": checkpointing,
        "validation_tokens": choice.validation_tokens or (2**20 if gpu else 2**13),
        "validate_every": choice.validate_every or (250 if gpu else max(1, steps // 2)),
        "checkpoint_every": choice.checkpoint_every or max(1, min(250, steps // 5)),
        "log_interval": choice.log_interval or (10 if gpu else 5),
        "sample_prompt": prompt if choice.sample_prompt is None else choice.sample_prompt,
    }
    given = {name: getattr(choice, name) for name in TrainingChoice.model_fields}
    return SettledTraining.model_validate(given | filled)


def _batch(
    choice: TrainingChoice, seq_len: int, fits: int, usual_tokens: int, gpus: int
) -> tuple[int, int]:
    """Rows in a micro-batch and micro-batches in a step, on each GPU."""
    rows, accumulate = choice.batch_size, choice.grad_accum_steps
    if choice.batch_tokens is None:
        wanted = max(1, round(usual_tokens / seq_len / gpus))
        if rows and accumulate:
            return rows, accumulate
        if rows:
            return rows, max(1, round(wanted / rows))
        if accumulate:
            return max(1, min(fits, round(wanted / accumulate))), accumulate
        rows = largest_divisor(wanted, fits)
        if 4 * rows >= fits:
            return rows, wanted // rows
        accumulate = -(
            -wanted // fits
        )  # 683 rows have no divisor that fits: 38 x 18 keep the GPU busy
        return round(wanted / accumulate), accumulate
    wanted, rest = divmod(choice.batch_tokens, seq_len)
    if rest:
        raise ValueError(
            f"batch_tokens {choice.batch_tokens} is not a multiple of seq_len {seq_len}: "
            f"take {max(1, wanted) * seq_len}"
        )
    wanted, rest = divmod(wanted, gpus)
    if rest:
        raise ValueError(
            f"{gpus} GPUs cannot share the {wanted * gpus + rest} rows of a step evenly: take a "
            f"number of GPUs that divides them, or, for a new run, batch_tokens "
            f"{max(1, wanted) * gpus * seq_len}"
        )
    if rows is None:
        share, rest = divmod(wanted, accumulate or 1)
        rows = share if accumulate else largest_divisor(wanted, fits)
    accumulate = accumulate or wanted // rows
    if rest or rows * accumulate != wanted:
        raise ValueError(
            f"batch_tokens {choice.batch_tokens} are {wanted} rows of {seq_len}"
            f"{f' for each of {gpus} GPUs' if gpus > 1 else ''}, which is not "
            f"batch_size {rows} x grad_accum_steps {max(1, accumulate)}: drop one of the three"
        )
    return rows, accumulate

"""Texts of a plan: log lines, the table of `zeroflow plan`, and a section of the report."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from zeroflow.estimate.memory import Memory
from zeroflow.report.pages import Part, Table
from zeroflow.report.plan import Compared, Plan
from zeroflow.settings.settled import Settlement
from zeroflow.text.markup import Markdown, escaped
from zeroflow.units import (
    binary,
    change,
    count,
    decimal,
    duration,
    parameter_count,
    vocabulary,
)


def cells(row: Compared) -> tuple[str, str, str, str]:
    """Return name, predicted value, measured value and difference of a figure, as text."""
    name, text = _FORMS[row.name]
    predicted, measured = (
        "unknown" if value is None else text(value) for value in (row.predicted, row.measured)
    )
    return name, predicted, measured, "" if row.difference is None else change(row.difference)


_FORMS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "tokens_per_second": ("speed", "{:,.0f} tokens/s".format),
    "seconds": ("training", "{:,.1f} s".format),
    "memory_bytes": ("peak memory", binary),
    "shard_bytes": ("shards", decimal),
    "checkpoint_bytes": ("a checkpoint", decimal),
    "checkpoint_seconds": ("writing it", "{:,.1f} s".format),
}


def compared_lines(rows: Sequence[Compared], plan: Plan | None) -> Iterator[str]:
    """Yield the log lines that compare a plan with the finished run."""
    for row in rows:
        name, predicted, measured, difference = cells(row)
        steps = _own_steps(plan) if plan and row.name in _OF_STEPS else ""
        by = f" ({difference})" if difference else ""
        yield f"plan of {name}{steps}: {predicted} predicted, {measured} measured{by}"


_OF_STEPS = ("tokens_per_second", "seconds")


def _own_steps(plan: Plan) -> str:
    """Return the steps by which an extension is compared, as text; empty for all steps."""
    done = plan.steps_done
    return f" of steps {done + 1:,} to {plan.steps:,}" if 0 < done < plan.steps else ""


def log_lines(settled: Settlement, plan: Plan) -> Iterator[str]:
    run, device, work = settled.run, settled.device, plan.workload
    choice = run.training
    yield f"data: {run.data.name} ({settled.corpus_reason})"
    yield f"tokenizer: {run.tokenizer.tokenizer_name} ({settled.tokenizer_reason})"
    state = "resumed" if settled.resumes else "new"
    yield f"run: {run.run_name} ({state}) in {run.run_dir}"
    each = f" on each of {work.ranks}" if work.ranks > 1 else ""
    about = "" if plan.vocabulary_is_certain or plan.vocabulary_is_limit else "about "
    parameters = f"{_limit(plan)}{about}{parameter_count(work.model.parameters)} parameters"
    yield f"model: {run.model.name}, {parameters} (vocabulary {_vocabulary(plan)})"
    if plan.init_from:
        yield f"start: the weights of {plan.init_from}"
    yield from plan.notes
    micro_batches = count(choice.grad_accum_steps, "micro-batch", "micro-batches")
    yield (
        f"training: {count(choice.max_steps, 'step')} x {choice.batch_tokens:,} tokens = "
        f"{run.train_tokens:,} tokens; {micro_batches} of "
        f"{count(choice.batch_size, 'row')} of {work.seq_len}{each}; peak learning rate "
        f"{choice.learning_rate:g}, {count(choice.warmup_steps, 'warm-up step')}, {choice.schedule}"
    )
    compiled = "compiled" if choice.compile else "not compiled"
    older = ""
    if device.kind == "cuda" and not device.has_bf16:
        capability = ".".join(map(str, device.capability or ()))
        older = f" (an older GPU, of compute capability {capability}: bf16 needs 8.0 or newer, "
        older += "torch.compile 7.0)"
    yield f"device: {work.devices}, {work.arithmetic}, {compiled}{older}"
    yield f"resume: {run.resume_promise}"
    if run.skip_preflight:
        yield "pre-flight: skipped, as requested"
    yield f"time: {time_line(plan)}"
    yield f"memory: {memory_line(plan)}"
    yield f"disk: {disk_line(plan)}"
    yield f"checkpoints: {checkpoints_line(plan)}"


def _limit(plan: Plan) -> str:
    """Return the words before a figure that grows with the vocabulary."""
    return "at most " if plan.vocabulary_is_limit else ""


def _vocabulary(plan: Plan) -> str:
    tokens, padded = plan.vocabulary_tokens, plan.workload.model.vocab_size
    size = f"{_limit(plan)}{vocabulary(tokens or padded, padded)}"
    return f"{size}, {plan.vocabulary_source}" if plan.vocabulary_source else size


def time_line(plan: Plan) -> str:
    """Return the time of the remaining steps as a range, and the source of the prediction."""
    rate, done = plan.rate, plan.steps_done
    if done >= plan.steps:
        return f"none, because all {count(plan.steps, 'step')} are trained"
    if rate is None:
        return f"unknown, {plan.rate_source}"
    tokens = plan.tokens * (plan.steps - done) / plan.steps
    remains = f" for steps {done + 1:,} to {plan.steps:,}" if done else ""
    slow, usual, fast = (duration(tokens / each) for each in (rate.low, rate.expected, rate.high))
    return (
        f"about {usual} of training{remains}, {fast} to {slow}, at {rate.low:,.0f} to "
        f"{rate.high:,.0f} tokens/s ({_rests_on(plan)})"
    )


def _rests_on(plan: Plan) -> str:
    if plan.load is None:
        return plan.rate_source
    return f"{plan.rate_source}; {plan.load}; the highest speed is that of an idle machine"


def memory_line(plan: Plan) -> str:
    if plan.predicted.memory_bytes is None:
        return plan.memory_source
    held, all_of_it = binary(plan.predicted.memory_bytes), binary(plan.device.memory_bytes)
    ranks = plan.workload.ranks
    if ranks > 1 and plan.device.kind == "cpu":
        return f"{held} for each of {ranks}, of {all_of_it} in total ({plan.memory_source})"
    each = f" on each of {ranks}" if ranks > 1 else ""
    return f"{held} of {all_of_it}{each} ({plan.memory_source})"


def disk_line(plan: Plan) -> str:
    shard_bytes = plan.predicted.shard_bytes or 0
    checkpoints = decimal(plan.disk_bytes - shard_bytes - plan.registered_bytes)
    models = plan.registered_bytes and f" and {decimal(plan.registered_bytes)} of models in MLflow"
    room = "" if plan.disk_bytes - plan.there_bytes <= plan.free_bytes else ": NOT ENOUGH"
    there = f", of which {decimal(plan.there_bytes)} exist" if plan.there_bytes else ""
    rests_on = f" ({plan.shard_source})" if plan.shard_source else ""
    return (
        f"about {decimal(shard_bytes)} of shards{rests_on} and up to {checkpoints} of "
        f"checkpoints{models or ''}{there}; {decimal(plan.free_bytes)} are free{room}"
    )


def checkpoints_line(plan: Plan) -> str:
    """Return how often checkpoints are due, how long a write takes, and whether that is longer."""
    size, takes = plan.predicted.checkpoint_bytes, plan.predicted.checkpoint_seconds
    interval = plan.checkpoint_interval_seconds
    if size is None or plan.checkpoint_every is None:
        return "unknown"
    line = f"{decimal(size)} every {count(plan.checkpoint_every, 'step')}"
    if interval:
        line += f", about {_brief(interval)} of training"
    if takes is None:
        limit = f": below {decimal(int(size / interval))}/s, some are skipped" if interval else ""
        return f"{line} ({plan.disk_source}{limit})"
    line += f"; a write takes about {_brief(takes)} ({decimal(int(size / takes))}/s, "
    line += f"{plan.disk_source})"
    if interval and takes > interval:
        every = plan.checkpoint_every * math.ceil(takes / interval)
        line += (
            f": LONGER than training, which does not wait, so one is saved about every {every} "
            f"steps. Use --checkpoint-every {every} or more"
        )
    return line


def _brief(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


_LABELS = {
    "loss": "loss, with logits",
    "checkpoint": "copy for a checkpoint",
    "program": "Python and libraries",
}


def text(plan: Plan) -> str:
    """Return all figures of a plan, in aligned columns."""
    return "\n".join(_lines(plan))


def section(plan: Plan, compared: Sequence[Compared]) -> tuple[Part, ...]:
    """Predicted and measured figures."""
    parts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    memory = ", ".join(f"{_label(name)} {binary(size)}" for name, size in plan.stage.memory.items())
    if plan.stage.host:
        on_host = ", ".join(f"{name} {binary(size)}" for name, size in plan.stage.host.items())
        memory += f"; in host memory: {on_host}"
    low_to_high = f" {plan.rate.low:,.0f} to {plan.rate.high:,.0f} tokens/s," if plan.rate else ""
    flops = f"{plan.flops_per_token / 1e6:,.1f} MFLOPs per token"
    speed = f"Speed and time{_own_steps(plan)}:{low_to_high} {_rests_on(plan)}."
    return (
        Markdown("## Predicted and measured"),
        Table(
            ("", "predicted", "measured", "difference"), list(map(cells, compared)), right=" rrr"
        ),
        escaped(f"{speed} Memory: {plan.memory_source}."),
        Markdown(
            f"- Parameters: {_limit(plan)}{parts}; {flops}\n"
            f"- Computed memory by part: {memory}; in total {binary(plan.stage.total)}\n"
            f"- Disk: {disk_line(plan)}\n"
            f"- Checkpoints: {checkpoints_line(plan)}"
        ),
    )


def _lines(plan: Plan) -> Iterator[str]:
    work, device = plan.workload, plan.device
    each = " each" if work.ranks > 1 and device.kind == "cuda" else ""
    yield f"plan of {plan.size} on {work.devices}, with {binary(device.memory_bytes)}{each}"
    yield from plan.notes
    yield ""
    total = sum(plan.parameters.values())
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in plan.parameters.items()]
    yield from _table(("parameters", f"{_limit(plan)}{total:,}", ""), rows)
    yield ""
    on_each = " on each" if work.ranks > 1 else ""
    choices = {"data": plan.data, "tokenizer": plan.tokenizer}
    yield from _facts(
        ({"start": f"the weights of {plan.init_from}"} if plan.init_from else {})
        | {name: f"{choice.name} ({choice.reason})" for name, choice in choices.items() if choice}
        | {
            "vocabulary": _vocabulary(plan),
            "FLOPs": f"{plan.flops_per_token / 1e6:,.1f} M per token, context {work.seq_len:,}",
            "tokens": f"{plan.tokens:,} in {count(plan.steps, 'step')} of {plan.batch_tokens:,}",
            "micro-batches": f"{work.accumulate} of {count(work.micro_batch_rows, 'row')}{on_each}"
            f", activation recomputation: {work.activation_checkpointing}",
            "arithmetic": f"{work.arithmetic}, {'' if work.compile else 'not '}compiled",
            "time": time_line(plan),
            "memory": memory_line(plan),
            "disk": disk_line(plan),
            "checkpoints": checkpoints_line(plan),
        }
    )
    yield ""
    yield from _memory(plan)


def _memory(plan: Plan) -> Iterator[str]:
    """Yield the table of memory by part for each ZeRO stage; on one device, all are the same."""
    sharded = plan.workload.is_sharded
    stages = plan.stages if sharded else plan.stages[:1]
    names = [name for name in Memory._fields if any(name in s.memory for s in stages)]
    heads = [f"stage {s.stage}" for s in stages] if sharded else [""]
    rows = [(_label(name), *(binary(s.memory.get(name, 0)) for s in stages)) for name in names]
    rows.append(("total", *(binary(s.total) for s in stages)))
    rows.append(("fits", *("NO" if s.fits == "no" else s.fits for s in stages)))
    if plan.device.kind == "cuda":
        rows.append(("default rows", *(str(s.micro_batch_rows) for s in stages)))
        rows.append(("recomputation", *(s.activation_checkpointing for s in stages)))
    rows += [
        (f"host: {name}", *(binary((s.host or {}).get(name, 0)) for s in stages))
        for name in plan.stage.host or ()
    ]
    title = "computed memory per rank" if plan.workload.ranks > 1 else "computed memory by part"
    yield from _table((title, *heads), rows)
    if plan.predicted.memory_bytes is None:
        yield "What such code needs in addition on a CPU is not known."
    elif plan.predicted.memory_bytes != plan.stage.total:
        yield "This is computed from the settings; the memory above was measured in earlier runs."
    if plan.stage.host:
        yield "From stage 1 on, weights, gradients and moments of this plan are in host memory, and"
        yield "the CPU updates them. Gathered weights on the GPU count as communication."
    elif plan.workload.ranks > 1:
        yield "From stage 1 on, each rank keeps its shard of the fp32 weights. Gathered weights"
        yield "(all, or at stage 3 those of two blocks) count as communication."


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _facts(facts: dict[str, str]) -> Iterator[str]:
    width = max(map(len, facts))
    for name, value in facts.items():
        yield f"{name:{width}}  {value}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table. The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *cells in (head, *rows):
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{name:<{widths[0]}}", *right]).rstrip()

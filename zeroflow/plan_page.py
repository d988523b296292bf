"""A plan as text for a terminal and as a section of the report."""

from collections.abc import Iterator, Sequence

from zeroflow import plan as plans
from zeroflow.plan import Compared, Plan
from zeroflow.planning import arithmetic, binary, devices

_LABELS = {
    "loss": "loss, with logits",
    "checkpoint": "copy for a checkpoint",
    "program": "Python and libraries",
}


def text(plan: Plan) -> str:
    """All figures, aligned."""
    return "\n".join(_lines(plan))


def section(plan: Plan, compared: Sequence[Compared]) -> str:
    """What was planned and what came of it, as Markdown."""
    held = "\n".join(
        f"| {name} | {predicted} | {measured} | {miss} |"
        for name, predicted, measured, miss in map(plans.cells, compared)
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    memory = ", ".join(f"{_label(name)} {binary(size)}" for name, size in plan.stage.memory.items())
    return (
        "## Predicted and measured\n\n"
        "| | predicted | measured | miss |\n|---|---:|---:|---:|\n"
        f"{held}\n\n"
        f"Speed and time: {plan.rate_source}. Memory: {plan.memory_source}.\n\n"
        f"- Parameters: {parts}; {plan.flops_per_token / 1e6:,.1f} MFLOPs a token\n"
        f"- Memory by part: {memory}\n"
        f"- Disk: {plans.disk_line(plan)}\n\n"
    )


def _lines(plan: Plan) -> Iterator[str]:
    work, device = plan.workload, plan.device
    each = " each" if work.gpus > 1 and device.kind == "cuda" else ""
    where = devices(device.name, work.gpus, work.zero_stage)
    yield f"plan of {plan.size} on {where}, with {binary(device.memory_bytes)}{each}"
    yield ""
    total = sum(plan.parameters.values())
    rows = [(name, f"{count:,}", f"{count / total:.1%}") for name, count in plan.parameters.items()]
    yield from _table(("parameters", f"{total:,}", ""), rows)
    yield ""
    assumed = "" if plan.vocabulary_is_certain else ", assumed until the tokenizer is there"
    on_each = " on each" if work.gpus > 1 else ""
    yield from _facts(
        {
            "vocabulary": f"{work.model.vocab_size:,}{assumed}",
            "FLOPs": f"{plan.flops_per_token / 1e6:,.1f} M a token at {work.seq_len:,} of context",
            "tokens": f"{plan.tokens:,} in {plan.steps:,} steps of {plan.batch_tokens:,}",
            "micro-batches": f"{work.accumulate} of {work.micro_batch_rows} rows{on_each}, "
            f"activations computed again: {work.activation_checkpointing}",
            "arithmetic": f"{arithmetic(work.precision, fp8=work.fp8)}, "
            f"{'' if work.compile else 'not '}compiled",
            "time": plans.time_line(plan),
            "memory": plans.memory_line(plan),
            "disk": plans.disk_line(plan),
        }
    )
    yield ""
    yield from _memory(plan)


def _memory(plan: Plan) -> Iterator[str]:
    """By part, for every stage of ZeRO; they are one and the same on one device."""
    stages = plan.stages if plan.workload.gpus > 1 else plan.stages[:1]
    names = list(plan.stages[0].memory)
    heads = [f"stage {s.stage}" for s in stages] if plan.workload.gpus > 1 else [""]
    rows = [(_label(name), *(binary(s.memory.get(name, 0)) for s in stages)) for name in names]
    rows.append(("total", *(binary(s.total) for s in stages)))
    rows.append(("fits", *("NO" if s.fits == "no" else s.fits for s in stages)))
    if plan.device.kind == "cuda":
        rows.append(("would choose rows", *(str(s.micro_batch_rows) for s in stages)))
        rows.append(("and compute again", *(s.activation_checkpointing for s in stages)))
    title = "memory of each, by ZeRO" if plan.workload.gpus > 1 else "memory by part"
    yield from _table((title, *heads), rows)
    if plan.workload.gpus > 1:
        yield "from stage 1 on each keeps its share of the fp32 weights; what it gathers of them"
        yield "to compute with, all or, at stage 3, those of two blocks, is communication"


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _facts(facts: dict[str, str]) -> Iterator[str]:
    width = max(map(len, facts))
    for name, value in facts.items():
        yield f"{name:{width}}  {value}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Names to the left, all else to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for name, *cells in (head, *rows):
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([f"{name:<{widths[0]}}", *right]).rstrip()

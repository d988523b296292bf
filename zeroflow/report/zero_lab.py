"""The page of the ZeRO laboratory."""

from collections.abc import Callable, Sequence

from zeroflow.lab.record import Amount, Collective, Largest, MemoryFit, ZeroLab, ZeroStage
from zeroflow.lab.study import Study
from zeroflow.lab.tensors import HOST_PARTS, PARTS
from zeroflow.report import zero_links, zero_plots
from zeroflow.report.page_text import as_html
from zeroflow.report.pages import Page, Part, Plot, Table
from zeroflow.text.markup import Markdown, bold, escaped
from zeroflow.tracking import tracker
from zeroflow.training.job import TrainingJob
from zeroflow.units import count, decimal, parameter_count

_PAPER = "[Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054)"

_MEMORY_REASONS = {
    0: "The paper keeps bf16 weights and gradients (2 + 2 bytes), and fp32 weights and moments "
    "(12). Here, weights and gradients are fp32 (4 + 4), and moments take 8: also 16. FSDP2 adds a "
    "copy of the weights for use.",
    1: "Weights and moments are sharded, also the fp32 weights, which the paper counts with the "
    "moments. With several micro-batches per step, gradients are unsharded and fp32: 4 bytes "
    "instead of 2. With one, they are reduce-scattered block by block, as at stage 2.",
    2: "The shard of the gradients is fp32: 4/N bytes instead of 2/N. The gathered weights are "
    "copies, which exist from the forward pass to the end of the backward pass.",
    3: "Weights are gathered one block at a time. The embedding is also the output head, so it "
    "stays gathered from the forward pass to the end of the backward pass.",
}

_TRAFFIC_REASONS = {
    0: "One all-reduce of the gradients per step, in fp32. It moves as many bytes as a "
    "reduce-scatter followed by an all-gather.",
    1: "One all-gather of the weights and one reduce-scatter of the gradients per step: the volume "
    "of an all-reduce.",
    2: "One all-gather of the weights per step, and one reduce-scatter of the gradients per "
    "micro-batch.",
    3: "Per micro-batch, two all-gathers of each block, one of the embedding, and one "
    "reduce-scatter of the gradients.",
}


def write(job: TrainingJob, study: Study) -> Page:
    """Write zero_lab.json and zero_lab.md with plots, and add them to MLflow."""
    folder, lab = job.folder, study.lab
    drawn = zero_plots.draw(study, folder)
    lab.write(folder.zero_lab)
    made = page(job, lab)
    made.write(folder.zero_lab_page)
    figures = {
        f"zero/{figure}": [float(getattr(one, figure)) for one in lab.stages]
        for figure in ("tokens_per_second", "exposed_seconds", "max_loss_difference")
    }
    ending = tracker.RunEnd(
        files=[*drawn, folder.zero_lab],
        pages={"zero_lab.html": as_html(folder.zero_lab_page, f"ZeRO laboratory {folder.name}")},
        series=figures,
        succeeded=lab.agrees,
    )
    tracking = job.tracking.replace(tags=job.tracking.tags | {"zero_lab": str(lab.agrees).lower()})
    tracker.finish(tracking, folder, [], ending)
    return made


def page(job: TrainingJob, lab: ZeroLab) -> Page:
    """Return the page of a study, whose plots exist."""
    folder = job.folder
    return Page(
        (
            Markdown(f"# ZeRO laboratory: {escaped(folder.name)}"),
            Table(("", ""), _summary(lab).items()),
            Markdown("## Memory"),
            Markdown(
                "Largest bytes of each part on a rank in a step, measured by the tensors that "
                "exist, and in brackets the error of the prediction. Parts are not largest at the "
                "same moment, so the peak is less than their sum. Temporaries inside kernels, and "
                "Python itself, are not included."
            ),
            _by_part(lab),
            *_on_host(lab),
            Plot(folder.zero_memory_plot, "memory by part"),
            Markdown(
                f"### Compared with the paper\n\nModel state in bytes per parameter; see {_PAPER}."
            ),
            _beside_the_paper(lab),
            Markdown("## Communication"),
            Markdown(
                "Collectives of a step and rank, counted where PyTorch calls the process group. "
                "Bytes are those of the whole buffer: the output of an all-gather, the input of a "
                "reduce-scatter or an all-reduce."
            ),
            _by_collective(lab),
            Plot(folder.zero_traffic_plot, "bytes by collective"),
            Markdown(
                "### Compared with the paper\n\nValues that a rank moves, in parameters Ψ; an "
                "all-reduce counts twice:"
            ),
            _volumes(lab),
            Markdown("## Speed"),
            _speeds(lab),
            Plot(folder.zero_timeline_plot, "timelines of a step"),
            *zero_links.parts(lab.slow_links, folder),
            *_under_cap(lab),
            Markdown("## Agreement"),
            Markdown(_agreement(lab)),
            Plot(folder.zero_losses_plot, "differences of the losses"),
        )
    )


def _summary(lab: ZeroLab) -> dict[str, str]:
    equal = all(c.as_predicted for one in lab.stages for c in one.collectives.values())
    amounts = [
        a for one in lab.stages for part in (one.memory, one.host or {}) for a in part.values()
    ]
    worst = max(abs(amount.error) for amount in amounts)
    return {
        "Ranks": f"{lab.ranks} on {lab.device}",
        "Model": f"{parameter_count(lab.parameters)} parameters, {lab.precision}"
        + (", compiled" if lab.compiled else ""),
        "Step": f"{lab.tokens_per_step:,} tokens, "
        f"{count(lab.micro_batches, 'micro-batch', 'micro-batches')} per rank",
        "Memory": f"predicted within {100 * worst:.1f} % in every part",
        "Collectives": "number and bytes as predicted" if equal else "NOT as predicted",
        "Losses": "agree" if lab.agrees else "DO NOT AGREE",
    }


def _columns(
    stages: Sequence[ZeroStage], rows: list[tuple[str, Callable[[ZeroStage], str]]], corner: str
) -> Table:
    """Return a table with a column for each stage."""
    head = (corner, *(f"stage {one.name}" for one in stages))
    cells = [(name, *(cell(one) for one in stages)) for name, cell in rows]
    return Table(head, cells, " " + "r" * len(stages))


def _by_part(lab: ZeroLab) -> Table:
    def row(part: str) -> tuple[str, Callable[[ZeroStage], str]]:
        return part, lambda one: _mebibytes(one.memory[part])

    return _columns(lab.stages, [row(part) for part in (*PARTS, "peak")], "MiB")


def _mebibytes(amount: Amount) -> str:
    if not amount.measured and not amount.predicted:
        return "0"
    return f"{amount.measured / 2**20:,.2f} ({100 * amount.error:+.1f} %)"


def _on_host(lab: ZeroLab) -> tuple[Part, ...]:
    """Return the table of the state in host memory, if there is any."""

    def row(part: str) -> tuple[str, Callable[[ZeroStage], str]]:
        return part, lambda one: _mebibytes((one.host or {})[part])

    stages = [one for one in lab.stages if one.host]
    if not stages:
        return ()
    return (
        Markdown(
            "Offloaded state of a rank in host memory. The table above is then that of the GPU. "
            "The allocator of pinned memory may take up to twice these bytes for parameters and "
            "gradients:"
        ),
        _columns(stages, [row(part) for part in HOST_PARTS], "MiB"),
    )


def _beside_the_paper(lab: ZeroLab) -> Table:
    n = lab.ranks

    def paper(stage: int, shards: int) -> float:
        return (16, 4 + 12 / shards, 2 + 14 / shards, 16 / shards)[stage]

    names = ("16", "4 + 12/N", "2 + 14/N", "16/N")
    state = ("parameters", "gradients", "moments", "gathered")
    rows = []
    for one in lab.stages:
        if one.offload != "none":
            continue  # the paper keeps all state on the GPU
        each = [one.memory[part].measured / lab.parameters for part in state]
        here = " + ".join(f"{size:.2f}" for size in each)
        expected = paper(one.stage, one.shard_group or n)
        rows.append(
            (
                one.name,
                f"{names[one.stage]} = {expected:.2f}",
                f"{here} = {sum(each):.2f}",
                _MEMORY_REASONS[one.stage],
            )
        )
    head = ("stage", "paper", f"measured: {' + '.join(state)}", "why they differ")
    return Table(head, rows)


def _by_collective(lab: ZeroLab) -> Table:
    rows = []
    for one in lab.stages:
        for name, found in one.collectives.items():
            rows.append(
                (
                    one.name,
                    name.replace("_", " "),
                    f"{found.count:,}",
                    f"{found.bytes:,}",
                    _verdict(found),
                )
            )
    return Table(("stage", "collective", "count", "bytes", "predicted"), rows, "  rr")


def _verdict(found: Collective) -> str:
    if found.as_predicted:
        return "the same"
    return bold(f"{found.predicted_count:,} of {found.predicted_bytes:,} bytes")


def _volumes(lab: ZeroLab) -> Table:
    rows = []
    for one in lab.stages:
        paper = 3 if one.stage == 3 else 2
        here = f"{lab.volume(one):.2f} Ψ"
        rows.append((one.name, f"{paper} Ψ", here, _TRAFFIC_REASONS[one.stage]))
    return Table(("stage", "paper", "measured", "what is moved"), rows, " rr")


def _speeds(lab: ZeroLab) -> Table:
    def milliseconds(seconds: float) -> str:
        return f"{1000 * seconds:,.1f}"

    return _columns(
        lab.stages,
        [
            ("tokens/s", lambda one: f"{one.tokens_per_second:,.0f}"),
            (
                "times one rank",
                lambda one: f"{one.tokens_per_second / lab.one_rank_tokens_per_second:.2f}",
            ),
            ("step (ms)", lambda one: milliseconds(one.step_seconds)),
            ("collectives in progress (ms)", lambda one: milliseconds(one.communication_seconds)),
            ("of it exposed (ms)", lambda one: milliseconds(one.exposed_seconds)),
            (
                "of it hidden by computation (ms)",
                lambda one: milliseconds(one.communication_seconds - one.exposed_seconds),
            ),
        ],
        "",
    )


_FIT_REASONS = {
    "row": "A row takes the same at every stage, because activations are not sharded. What a stage "
    "saves of the state is left for rows.",
    "block": "A block takes its activations, which are not sharded, and its weights, gradients and "
    "moments, of which a stage shards some.",
}
"""Reasons why more rows and more blocks fit at a higher stage."""


def _under_cap(lab: ZeroLab) -> tuple[Part, ...]:
    if lab.fit is None:
        return ()
    intro = (
        f"The tensors of a rank may take {decimal(lab.fit.cap_bytes)}. At the same work, a lower "
        "stage is often as fast; under a cap, a higher stage fits more. The formula chooses the "
        "sizes, and ranks measure them: the peak must be within the cap, and that with one more "
        "row or block above it. In brackets is the error of the prediction."
    )
    return (
        Markdown("## Fit to memory"),
        Markdown(intro),
        Markdown("### Largest micro-batch"),
        _largest(lab.fit, [one.micro_batch for one in lab.fit.stages], "row"),
        Markdown(_FIT_REASONS["row"]),
        Markdown("### Largest model\n\nThe model of the run with another number of blocks:"),
        _largest(lab.fit, [one.model for one in lab.fit.stages], "block"),
        Markdown(_FIT_REASONS["block"]),
    )


def _largest(fit: MemoryFit, found: list[Largest | None], unit: str) -> Table:
    """
    Args:
        found: the largest of each stage.
        unit: what there is more of, "row" or "block".
    """
    head = ("stage", f"{unit}s", "parameters", "peak (MB)", f"with one more {unit}", "tokens/s")
    rows = []
    for stage, one in zip(fit.stages, found, strict=True):
        if one is None:
            rows.append((stage.name, "none", "", "", "", ""))
            continue
        above = _megabytes(one.peak_above)
        rows.append(
            (
                stage.name,
                f"{one.micro_batch_rows if unit == 'row' else one.blocks:,}",
                parameter_count(one.parameters),
                _megabytes(one.peak),
                above if one.is_largest(fit.cap_bytes) else bold(f"{above}: not the largest"),
                f"{one.tokens_per_second:,.0f}",
            )
        )
    return Table(head, rows, " " + "r" * (len(head) - 1))


def _megabytes(amount: Amount) -> str:
    return f"{amount.measured / 1e6:,.2f} ({100 * amount.error:+.1f} %)"


def _agreement(lab: ZeroLab) -> str:
    worst = ", ".join(f"{one.max_loss_difference:.1e} (stage {one.name})" for one in lab.stages)
    verdict = "All stages agree" if lab.agrees else "NOT all stages agree"
    return (
        f"Every stage trained {count(lab.steps, 'step')} from the same weights on the same rows as "
        f"one rank. Largest difference of a loss, in nats per token: {worst}. Two runs of one rank "
        "that split a step differently into micro-batches differ only in rounding, by "
        f"{lab.noise_floor:.1e}. {verdict}: the tolerance is {lab.tolerance:.1e}."
    )

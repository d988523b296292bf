"""Tables of a run's scores on texts and tasks."""

from collections.abc import Iterator

from zeroflow.inference.evaluation import Evaluation, Evaluations, TextScore, with_error
from zeroflow.report.pages import Part, Table
from zeroflow.text.markup import Markdown, escaped


def section(found: Evaluations) -> tuple[Part, ...]:
    """Return the section about the evaluations of a run; empty if there are none."""
    if not found.steps:
        return ()
    return (Markdown("## Evaluation"), *(part for one in found.steps for part in tables(one)))


def tables(one: Evaluation) -> Iterator[Part]:
    """Yield the tables about one checkpoint."""
    yield Markdown(f"Checkpoint of step {one.step:,}. ± is the standard error.")
    if one.texts:
        head = ("text", "loss", "bits per byte", "perplexity", "tokens", "documents")
        yield Table(head, [_text_cells(score) for score in one.texts], right=" rrrrr")
    if one.tasks:
        rows = [
            (task.title, name, with_error(metric.value, metric.error), f"{task.examples:,}")
            for task in one.tasks
            for name, metric in task.metrics.items()
        ]
        yield Table(("task", "figure", "value", "examples"), rows, right="  rr")
        if one.harness:
            yield escaped(f"Tasks of lm-evaluation-harness {one.harness}.")


def _text_cells(score: TextScore) -> tuple[str, ...]:
    return (
        score.title,
        with_error(score.loss, score.loss_error),
        "none" if score.bpb is None else with_error(score.bpb, score.bpb_error),
        f"{score.perplexity:,.2f}",
        f"{score.tokens:,}",
        f"{score.documents:,}",
    )

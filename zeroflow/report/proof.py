"""The page of a proof that resume is exact."""

from zeroflow.checks import resume
from zeroflow.checks.resume import Proof
from zeroflow.report import plots
from zeroflow.report.page_text import as_html
from zeroflow.report.pages import Page, Plot, Table
from zeroflow.text.markup import Markdown, bold, code, escaped
from zeroflow.tracking import tracker
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS
from zeroflow.units import count


def write(job: TrainingJob, proof: Proof) -> Page:
    """Write proof.json and proof.md with a plot, and add them to MLflow."""
    folder = job.folder
    undisturbed, killed = (
        METRICS.read(folder.inner(name).metrics) for name in (resume.UNDISTURBED, resume.KILLED)
    )
    kills = [kill.step for kill in proof.kills]
    plot = plots.resume_curves(undisturbed, killed, folder.proof_plot, kills=kills)
    proof.write(folder.proof)
    made = page(job, proof)
    made.write(folder.proof_page)
    ending = tracker.RunEnd(
        files=[plot, folder.proof],
        pages={"proof.html": as_html(folder.proof_page, f"proof of {folder.name}")},
        series={},
        succeeded=proof.passed,
    )
    result = {"proof": "passed" if proof.passed else "failed", "kills": str(len(proof.kills))}
    tracking = job.tracking.replace(tags=job.tracking.tags | result)
    tracker.finish(tracking, folder, [], ending)  # each of the two runs has its own MLflow run
    return made


def page(job: TrainingJob, proof: Proof) -> Page:
    """Return the page of a proof."""
    work = job.training.workload
    rows = {
        "Result": Markdown(
            f"{bold('passed' if proof.passed else 'FAILED')}: {escaped(proof.reason)}"
        ),
        "Trained twice": f"{count(proof.steps, 'step')}, {work.model.parameters:,} parameters, on "
        f"{work.device} in {work.arithmetic}"
        + (", compiled" if work.compile else "")
        + (", deterministic" if work.deterministic else ""),
        "Killed with SIGKILL": f"{len(proof.kills)} of {proof.kills_asked} requested times",
        "Numbers compared": f"{proof.numbers:,}: every loss, gradient norm and validation loss, "
        "bit for bit",
        "Tensors compared": f"{proof.tensors:,}: weights, optimiser and random state of the last "
        "checkpoint",
        **{f"sha256, {name}": code(digest) for name, digest in proof.sha256.items()},
    }
    kills = [
        tuple(map(str, (number, kill.aimed_at, kill.moment, kill.step, kill.resumed_at)))
        for number, kill in enumerate(proof.kills, 1)
    ]
    return Page(
        (
            Markdown(f"# Proof that resume is exact: {escaped(job.run_dir.name)}"),
            Table(("", ""), rows.items()),
            Plot(job.folder.proof_plot, "losses of both runs"),
            Markdown("## Kills"),
            Table(("", "aimed at", "killed", "last logged step", "resumed from step"), kills),
        )
    )

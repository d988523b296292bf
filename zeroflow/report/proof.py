"""The page of a proof that resume is exact."""

from pathlib import Path

from zeroflow.checks import resume
from zeroflow.checks.resume import Proof
from zeroflow.report import pictures
from zeroflow.tracking import tracker
from zeroflow.training.job import TrainingJob
from zeroflow.training.metrics import METRICS


def write(job: TrainingJob, proof: Proof) -> Path:
    """Write proof.json and proof.md with a picture, and add them to MLflow.

    Returns:
        the path of proof.md
    """
    folder = job.folder
    undisturbed, killed = (
        METRICS.read(folder.inner(name).metrics) for name in (resume.UNDISTURBED, resume.KILLED)
    )
    kills = [kill.step for kill in proof.kills]
    picture = pictures.resume_curves(undisturbed, killed, folder.proof_picture, kills=kills)
    proof.write(folder.proof)
    page = folder.proof_page
    page.write_text(markdown(job, proof), encoding="utf-8")
    ending = tracker.RunEnd(
        files=[page, picture, folder.proof],
        figures={"proof/passed": float(proof.passed), "proof/kills": len(proof.kills)},
        step=proof.steps,
        series={},
        succeeded=proof.passed,
    )
    tracker.finish(job.tracking, folder, [], ending)  # the trainings have MLflow runs of their own
    return page


def markdown(job: TrainingJob, proof: Proof) -> str:
    """Return the page of a proof as Markdown."""
    work = job.training.workload
    rows = {
        "Result": f"**{'passed' if proof.passed else 'FAILED'}**: {proof.reason}",
        "Trained twice": f"{proof.steps:,} steps, {work.model.parameters:,} parameters, on "
        f"{work.device} in {work.arithmetic}"
        + (", compiled" if work.compile else "")
        + (", deterministic" if work.deterministic else ""),
        "Killed with SIGKILL": f"{len(proof.kills)} of {proof.kills_asked} requested times",
        "Numbers compared": f"{proof.numbers:,}: every loss, gradient norm and validation loss, to "
        "the bit",
        "Tensors compared": f"{proof.tensors:,}: weights, optimiser and random state of the last "
        "checkpoint",
        **{f"sha256, {name}": f"`{digest}`" for name, digest in proof.sha256.items()},
    }
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kills = "\n".join(
        f"| {number} | {kill.aimed_at} | {kill.moment} | {kill.step} | {kill.resumed_at} |"
        for number, kill in enumerate(proof.kills, 1)
    )
    return (
        f"# Proof of resume: {job.run_dir.name}\n\n| | |\n|---|---|\n{facts}\n\n"
        f"![losses of both trainings]({job.folder.proof_picture.name})\n\n## Kills\n\n"
        "| | aimed at | came | last step logged | resumed from step |\n|---|---|---|---|---|\n"
        f"{kills}\n"
    )

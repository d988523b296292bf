"""The proof that resume is exact as a person asks for it: its settings, its stages and its page."""

from collections.abc import Callable
from pathlib import Path

from zeroflow import artifacts, pictures, plan, settling, tracking
from zeroflow import run as runs
from zeroflow.checks import resume
from zeroflow.checks.overfit import OverfitConfig
from zeroflow.checks.resume import Proof, ProofConfig, ResumeInexact
from zeroflow.config import Config
from zeroflow.data import shards, tokenizer
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.model import build
from zeroflow.planning import find_device
from zeroflow.progress import TrainingProgress
from zeroflow.run import ModelChoice, RunConfig
from zeroflow.training import events
from zeroflow.training import job as jobs
from zeroflow.training.job import CHECKPOINTS, TrainingJob

PROOF = "proof.json"
MARKDOWN = "proof.md"
_CURVES = "proof.png"

_STEPS = 60
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
_SMALL = {"seq_len": 64, "validation_tokens": 4096}
_BATCH = ("batch_size", "grad_accum_steps", "batch_tokens")


class ProofRun(Config):
    """A run to prove the resume of, and how."""

    proof: ProofConfig = ProofConfig()
    run: RunConfig = RunConfig()


def settings(asked: RunConfig) -> RunConfig:
    """The run that a proof trains: what `asked` leaves open is small and quick.

    Raises:
        ValueError: a setting is one that a proof does not have, or the name is that of a real run.
    """
    if asked.overfit != OverfitConfig():
        raise ValueError("a proof has no overfit check: drop --overfit-steps and --overfit-loss")
    if asked.skip_preflight:
        raise ValueError("a proof has no pre-flight: drop --skip-preflight")
    if asked.run_name and (asked.run_dir / CHECKPOINTS).exists():
        raise ValueError(f"{asked.run_name} is a training run: give the proof another --run-name")
    chosen = {name: getattr(asked.training, name) for name in asked.training.model_fields_set}
    given = {name: value for name, value in chosen.items() if value is not None}
    steps = given.get("max_steps") or _STEPS
    training = {"max_steps": steps, "log_interval": 1, "validate_every": max(1, steps // 6)}
    if asked.model == ModelChoice():
        training |= _SMALL
        if not any(given.get(name) for name in _BATCH):
            training["batch_tokens"] = 8 * (given.get("seq_len") or _SMALL["seq_len"])
        asked = asked.replace(model=ModelChoice(**_SHAPE))
    if find_device(asked.device).kind == "cuda":
        training["deterministic"] = True  # other kernels are not even the same undisturbed
    if asked.data == CorpusConfig():
        asked = asked.replace(data=CorpusConfig(data_mode="synthetic"))
        if asked.tokenizer == TokenizerConfig():
            asked = asked.replace(tokenizer=TokenizerConfig(vocab_size=512))
    run = asked.replace(training=type(asked.training)(**training | given))
    if run.run_name is None:
        identity = {name: str(value) for name, value in runs.leaves(run) if name != "cache_dir"}
        run = run.replace(run_name=f"proof-{artifacts.fingerprint(identity)[:6]}")
    return run


def prove(asked: ProofRun) -> Path:
    """From settings to a proof.

    Returns:
        the path of proof.md

    Raises:
        ResumeInexact: the proof failed; its page says how.
    """
    with jobs.ownership() as own:
        return _prove(asked, own)


def _prove(asked: ProofRun, own: Callable[[Path], None]) -> Path:
    settled = plan.make(settings(asked.run), own)
    run = settled.run
    tokens = tokenizer.fetch(run.tokenizer, run.data, run.cache_dir)
    with shards.in_threads(run.build.data_workers) as builders:
        rows = shards.build(
            run.shard_config, run.data, tokens, run.cache_dir, seed=run.seed, builders=builders
        )
    model = build.build(run.model.shape, tokens.vocab_size, run.run_dir)
    job = settling.training_job(settled, model, rows, tokens, tags={})
    return passed(*demonstrate(job, asked.proof))


def demonstrate(job: TrainingJob, config: ProofConfig) -> tuple[Proof, Path]:
    """Do the proof, and write its page into the job's directory.

    Returns:
        what came out, and the path of proof.md
    """
    with TrainingProgress() as progress:
        proof = resume.prove(job, config, progress)
    return proof, write(job, proof)


def passed(proof: Proof, page: Path) -> Path:
    """`page`, if the proof has passed.

    Raises:
        ResumeInexact: it has not.
    """
    if not proof.passed:
        raise ResumeInexact(f"resume is not exact here: {proof.reason}\nreport: {page}")
    return page


def write(job: TrainingJob, proof: Proof) -> Path:
    """Write proof.json and proof.md with a picture, and add them to MLflow.

    Returns:
        the path of proof.md
    """
    folder = job.run_dir
    undisturbed, killed = (
        events.read(folder / name / events.METRICS) for name in (resume.UNDISTURBED, resume.KILLED)
    )
    kills = [kill.step for kill in proof.kills]
    picture = pictures.resume_curves(undisturbed, killed, folder / _CURVES, kills=kills)
    artifacts.write_json(folder / PROOF, proof.model_dump(mode="json"))
    page = folder / MARKDOWN
    page.write_text(markdown(job, proof), encoding="utf-8")
    tracking.finish(
        job.tracking,
        folder,
        [],  # what was trained is in runs of its own
        files=[page, picture, folder / PROOF],
        step=proof.steps,
        metrics={"proof/passed": float(proof.passed), "proof/kills": len(proof.kills)},
        series={},
        succeeded=proof.passed,
    )
    return page


def markdown(job: TrainingJob, proof: Proof) -> str:
    """The page of a proof."""
    compute = job.training.compute
    rows = {
        "Result": f"**{'passed' if proof.passed else 'FAILED'}**: {proof.reason}",
        "Trained twice": f"{proof.steps:,} steps, {job.model.parameters:,} parameters, on "
        f"{compute.device} in {compute.arithmetic}"
        + (", compiled" if compute.compile else "")
        + (", deterministic" if compute.deterministic else ""),
        "Killed with SIGKILL": f"{len(proof.kills)} times of {proof.kills_asked} asked for",
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
        f"![losses of both trainings]({_CURVES})\n\n## Kills\n\n"
        "| | aimed at | came | last step logged | went on from step |\n|---|---|---|---|---|\n"
        f"{kills}\n"
    )

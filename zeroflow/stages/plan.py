"""The first stage: settle the settings of a run, and predict its figures."""

import logging

from zeroflow.data.expected_text import expected_text
from zeroflow.device import ASSUMED_CAPABILITY, free_bytes, gpus_named, known_gpu
from zeroflow.estimate.cost import cost
from zeroflow.estimate.run_records import read_records
from zeroflow.report import plan as plans
from zeroflow.report import plan_page
from zeroflow.report.plan import Choice, Plan
from zeroflow.settings.remarks import remarks
from zeroflow.settings.run_config import RunConfig
from zeroflow.settings.settle import Acquire, foresee, settle
from zeroflow.settings.settled import Settlement

log = logging.getLogger(__name__)


def plan(asked: RunConfig, acquire: Acquire = lambda run_dir: None) -> Settlement:
    """Settle `asked` and log the plan of the run, before anything is built.

    The plan is saved in the run's directory. The log has the remaining time at the speed that is
    expected now.

    Raises:
        ValueError, hub.HubError: as `settle` does.
    """
    settlement = settle(asked, acquire)
    now = predict(settlement)
    plans.save(now, settlement.run.folder)
    for line in plan_page.log_lines(settlement, now):
        log.info("%s", line)
    return settlement


def forecast(asked: RunConfig, *, gpu: str | None = None, memory_gb: float | None = None) -> Plan:
    """Plan the run that `asked` would start, without building or recording anything.

    The plan may be for more GPUs than this machine has.

    Args:
        gpu: name of a GPU; None for the device of this machine.
        memory_gb: memory of a GPU that is not known.

    Raises:
        ValueError: settings contradict each other, the device or the number of GPUs, there are no
            such files, or a small text does not suffice for training and validation.
    """
    if memory_gb is not None and not gpu:
        raise ValueError(f"--memory-gb {memory_gb:g} is that of a GPU: name it with --gpu")
    device = known_gpu(gpu, memory_gb) if gpu else None
    return predict(foresee(asked, device), notes=_notes(gpu) if gpu else (), here=not gpu)


def _notes(gpu: str) -> tuple[str, ...]:
    """Return the assumptions about the GPU with the name `gpu`."""
    taken, *others = gpus_named(gpu) or [""]
    if not taken:
        capability = ".".join(map(str, ASSUMED_CAPABILITY))
        return (f"{gpu} is not a known GPU: compute capability {capability} is assumed",)
    if not others:
        return ()
    return (f"--gpu {gpu} means {taken}; other known GPUs: {', '.join(others)}",)


def predict(settlement: Settlement, *, notes: tuple[str, ...] = (), here: bool = True) -> Plan:
    """Plan a run: its text, its workload, and what that costs on the device.

    Args:
        notes: assumptions about the device.
        here: the run is for this machine, so its disk may be measured.
    """
    run, device = settlement.run, settlement.device
    steps = run.schedule.steps
    notes += remarks(run)
    records = read_records(run.folder)
    text = expected_text(
        run.tokenizer, run.data, run.shard_config, records.tokenizer, run.cache_dir
    )
    vocabulary = text.vocabulary
    model = run.network(vocabulary.size)
    work = run.workload(model, device)
    disk = run.cache_dir if here else None
    costs = cost(work, device, records, planned=(run.run_name, steps), folder=disk)
    done = min(records.steps_done, steps)
    registered = 2 * 4 * model.parameters if run.stores_models else 0  # last and best, in fp32
    # An extended run registers the models of its new steps
    stored = min(registered, records.registered_bytes) if done == steps else 0
    return Plan(
        run=run.run_name,
        size=run.model.name,
        init_from=run.model.init_from,
        device=device,
        notes=notes,
        load=costs.load,
        workload=work,
        data=Choice(name=run.data.name, reason=settlement.corpus_reason),
        tokenizer=Choice(name=run.tokenizer.tokenizer_name, reason=settlement.tokenizer_reason),
        vocabulary_is_certain=vocabulary.is_certain,
        vocabulary_is_limit=vocabulary.is_limit,
        vocabulary_source=vocabulary.source,
        vocabulary_tokens=vocabulary.size,
        parameters=model.parameters_by_part,
        flops_per_token=work.flops_per_token,
        tokens=run.train_tokens,
        steps=steps,
        steps_done=done,
        batch_tokens=work.batch_tokens,
        stages=costs.stages,
        predicted=costs.figures(_remaining(run.train_tokens, steps, done), text.shard_bytes),
        rate=costs.speed.rate,
        rate_source=costs.speed.source,
        memory_source=costs.memory.source,
        shard_source=text.source,
        disk_bytes=text.shard_bytes + run.most_checkpoints * costs.checkpoint_bytes + registered,
        registered_bytes=registered,
        there_bytes=records.there_bytes + stored,
        free_bytes=free_bytes(run.cache_dir),
        checkpoint_every=run.cadence.checkpoint,
        disk_source=costs.disk.source,
    )


def _remaining(tokens: int, steps: int, done: int) -> float:
    """Return the tokens of the steps that remain; those of all steps if none remains."""
    return tokens * ((steps - done) or steps) / steps

"""Checks for settings that contradict each other or the device, before any work is done."""

import importlib.util
import math
from typing import ClassVar

import numpy as np

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.slices import require_readable
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TRAINED_TOKENIZER, TokenizerConfig
from zeroflow.data.vocabulary import known_vocab_size
from zeroflow.device import Device, gpu_count
from zeroflow.estimate.memory import PROGRAM_BYTES
from zeroflow.settings.defaults import nominal_workload
from zeroflow.settings.run_config import RunConfig, TrainingChoice
from zeroflow.settings.settled import Settled
from zeroflow.training.workload import Workload


def refuse_what_does_nothing(asked: RunConfig) -> None:
    """
    Raises:
        ValueError: a setting has no effect with the data or the tokenizer.
    """
    asked.data.refuse_unread_settings()
    default = TrainingChoice.model_fields["validation_fraction"].default
    if asked.data.validation_path and asked.training.validation_fraction != default:
        raise ValueError(
            "--validation-fraction has no effect with --validation-path, which sets the text for "
            "validation: drop one of them"
        )
    if asked.register_ and not asked.data.is_text:
        raise ValueError(
            "a registered model writes text, and a model of synthetic data does not: drop "
            "--register"
        )
    tokenizer = asked.tokenizer
    trained = tokenizer.tokenizer_name in ("auto", TRAINED_TOKENIZER, SYNTHETIC_TOKENIZER)
    if not trained and tokenizer.vocab_size != TokenizerConfig.model_fields["vocab_size"].default:
        raise ValueError(
            f"--vocab-size has no effect with --tokenizer-name {tokenizer.tokenizer_name}, which "
            "has its own vocabulary: drop it, or use --tokenizer-name train"
        )
    if tokenizer.end_of_text and tokenizer.tokenizer_name == TRAINED_TOKENIZER:
        raise ValueError(
            "--end-of-text has no effect with --tokenizer-name train, which has its own end token: "
            "drop it"
        )


def refuse_an_impossible_evaluation(asked: RunConfig) -> None:
    """
    Raises:
        ValueError: the trained model could not be evaluated as requested.
    """
    choice = asked.evaluation
    if choice.is_asked_for and not asked.data.is_text:
        raise ValueError(
            "a model of synthetic data has no loss on texts and tasks: drop --evaluate-path, "
            "--evaluate-tasks and --evaluate-core-path"
        )
    if choice.evaluate_tasks and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--evaluate-tasks needs lm-evaluation-harness: pip install 'zeroflow[eval]'"
        )
    if choice.evaluate_task_path and not choice.evaluate_tasks:
        raise ValueError(
            "--evaluate-task-path has no effect without --evaluate-tasks: name tasks, or drop it"
        )
    for path in choice.evaluate_path:
        require_readable(_EvaluationText(data_mode="files", data_path=(path,)))


class _EvaluationText(CorpusConfig):
    """A text of `evaluate_path`, as a corpus."""

    files_flag: ClassVar[str] = "--evaluate-path"


def refuse_what_the_device_cannot(run: RunConfig, device: Device) -> None:
    """
    Raises:
        ValueError: the device lacks what a setting needs.
    """
    nominal = nominal_workload(run, device)
    nominal.require_possible_on(device)
    _refuse_offload(nominal)
    if nominal.zero_stage and not nominal.is_sharded:
        raise ValueError(
            f"--zero-stage {nominal.zero_stage} shards state across several GPUs, but the run has "
            "one: add --gpus or --offload optimizer, or drop --zero-stage"
        )
    _refuse_shard_group(nominal.ranks, nominal.zero_stage, nominal.shard_group)
    _refuse_reshard_group(nominal)


def _refuse_offload(nominal: Workload) -> None:
    if nominal.offload == "none":
        return
    if nominal.device == "cpu":
        raise ValueError(
            f"--offload {nominal.offload} moves state from the memory of a GPU to that of the "
            f"host, but the device is a CPU ({nominal.device_name}): drop it"
        )
    if nominal.zero_stage == 0:
        raise ValueError(
            f"--offload {nominal.offload} needs ZeRO stage 1, 2 or 3: at stage 0, every rank would "
            "keep the whole state in host memory and update it there. Use --zero-stage 2, or drop "
            "--offload"
        )


def _refuse_shard_group(ranks: int, stage: int, group: int | None) -> None:
    if group is None:
        return
    if stage == 0:
        raise ValueError(
            f"--shard-group {group} has no effect at ZeRO stage 0, which shards nothing: add "
            "--zero-stage, or drop it"
        )
    if ranks % group:
        possible = [number for number in range(2, ranks + 1) if ranks % number == 0]
        raise ValueError(
            f"--shard-group {group} does not divide the {ranks} GPUs of the run: use one of "
            f"{', '.join(map(str, possible))}, or drop it"
        )


def _refuse_reshard_group(nominal: Workload) -> None:
    group, shards = nominal.reshard_group, nominal.shards
    if group is None:
        return
    if nominal.zero_stage != 3:
        raise ValueError(
            f"--reshard-group {group} has no effect at ZeRO stage {nominal.zero_stage}, which "
            "keeps the gathered weights for the backward pass: use --zero-stage 3, or drop it"
        )
    possible = [number for number in range(2, shards) if shards % number == 0]
    if group not in possible:
        use = f"use one of {', '.join(map(str, possible))}, or drop it" if possible else "drop it"
        raise ValueError(
            f"--reshard-group {group} does not divide the {shards} GPUs that share the state into "
            f"smaller groups: {use}"
        )


def refuse_ids_beyond_the_token_type(run: RunConfig, tokenizer: TokenizerConfig) -> None:
    """
    Args:
        tokenizer: the tokenizer of the run, which need not be in the cache.

    Raises:
        ValueError: its ids do not fit the integer type of the shards, or its files are not those of
            a tokenizer.
    """
    size = known_vocab_size(tokenizer, run.cache_dir)
    kind = run.training.token_type
    highest = int(np.iinfo(kind).max)
    if size is None or size - 1 <= highest:
        return
    if tokenizer.tokenizer_name in ("auto", TRAINED_TOKENIZER, SYNTHETIC_TOKENIZER):
        found = f"--vocab-size {size} gives ids up to {size - 1:,}"
        remedy = f"use --token-type int32, or at most --vocab-size {highest + 1}"
    else:
        found = f"{tokenizer.tokenizer_name} has ids up to {size - 1:,}"
        remedy = "use --token-type int32"
    raise ValueError(f"{found}, and --token-type {kind} holds ids up to {highest:,}: {remedy}")


def refuse_machines_that_cannot_share(run: Settled) -> None:
    """
    Raises:
        ValueError: a launcher is set for one machine, or the rows of a step cannot be divided among
            the ranks of --min-nodes or more machines.
    """
    least, nodes, each = run.hosts.min_nodes, run.training.nodes, run.training.gpus
    if run.hosts.launcher != "by-hand" and nodes == 1:
        raise ValueError(
            f"--launcher {run.hosts.launcher} needs --nodes 2 or more: raise --nodes, or drop "
            "--launcher and start this command in a job"
        )
    if least is None:
        return
    if not least < nodes:
        raise ValueError(
            f"--min-nodes {least} is not less than --nodes {nodes}: add --nodes, or drop it"
        )
    if uneven := [n for n in range(least, nodes) if run.batch_rows % (n * each)]:
        unit = math.lcm(*(n * each for n in range(least, nodes + 1)))
        tokens = -(-run.batch_rows // unit) * unit * run.training.seq_len
        raise ValueError(
            f"the {uneven[0] * each} ranks of {uneven[0]} machines cannot share the "
            f"{run.batch_rows} rows of a step evenly: raise --min-nodes, or, for a new run, use "
            f"--batch-tokens {tokens}"
        )


def refuse_more_gpus_than_there_are(run: RunConfig, device: Device) -> None:
    """
    Raises:
        ValueError: this machine has fewer GPUs than the run asks for, or less memory than the
            processes need that stand in for GPUs on a CPU.
    """
    count = run.training.gpus or 1
    if count == 1:
        return
    if run.device == "cpu":
        _refuse_more_processes_than_memory_holds(count, device)
        return
    there = gpu_count() if device.kind == "cuda" else 0
    if there < count:
        remedy = "use fewer" if there else f"--device cpu uses {count} processes on a CPU instead"
        raise ValueError(f"--gpus {count}, but PyTorch sees {there or 'none'}: {remedy}")


def _refuse_more_processes_than_memory_holds(count: int, device: Device) -> None:
    most = device.memory_bytes // PROGRAM_BYTES
    if count > most:
        raise ValueError(
            f"--gpus {count} with --device cpu starts {count:,} processes, and this machine has "
            f"memory for Python and its libraries in {most}: use fewer"
        )


def refuse_a_plan_for_no_gpu(run: RunConfig, device: Device) -> None:
    """
    Raises:
        ValueError: the plan is for several GPUs without a name, and this machine has no GPU.
    """
    count = run.training.gpus or 1
    if count > 1 and device.kind == "cpu" and run.device != "cpu":
        raise ValueError(f"--gpus {count}, but this machine has none: name one with --gpu")


def refuse_one_rank(run: RunConfig, purpose: str) -> None:
    """
    Raises:
        ValueError: `run` is on one GPU, and `purpose` compares ZeRO stages.
    """
    if run.training.ranks == 1:
        raise ValueError(
            f"{purpose} needs several GPUs: add --gpus, such as --gpus 2. With --device cpu, "
            "processes stand in for GPUs"
        )

"""Settings of the ZeRO laboratory."""

from typing import ClassVar, Self

from zeroflow import artifacts
from zeroflow.checks.overfit import OverfitConfig
from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.device import Device, find_device
from zeroflow.estimate.memory import USABLE
from zeroflow.lab import network
from zeroflow.lab.study import LabConfig
from zeroflow.reuse import flat
from zeroflow.settings.refusals import refuse_one_rank
from zeroflow.settings.run_config import EvaluationChoice, ModelChoice, RunConfig

_STEPS = 20
"""Default number of steps."""

# Defaults on a CPU: a step takes tens of milliseconds, and weights are a visible part of the memory
_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}

_SMALL = {"seq_len": 64, "batch_size": 4, "grad_accum_steps": 2}

_BATCH = ("batch_size", "grad_accum_steps", "batch_tokens")
"""Settings that define the batch. If any is given, the batch has no default here."""


class ZeroLabRun(Config):
    """Settings of the laboratory, and of the run whose steps it measures."""

    lab: LabConfig = LabConfig()
    run: RunConfig = RunConfig()

    no_flags: ClassVar[tuple[str, ...]] = (
        "run.sweep",
        "run.skip_preflight",
        "run.log_to",
        "run.register_",
        "run.training.zero_stage",
        "run.training.reshard_group",
        "run.training.offload",
        *(f"run.overfit.{name}" for name in OverfitConfig.model_fields),
        *(f"run.evaluation.{name}" for name in EvaluationChoice.model_fields),
    )
    """Settings that do not apply to the laboratory."""

    @property
    def anywhere(self) -> Self:
        """Return the same settings with absolute paths."""
        return self.model_copy(update={"run": self.run.anywhere})


def lab_run(asked: ZeroLabRun) -> RunConfig:
    """Return the settings of the run that is measured; the defaults on a CPU are small.

    Raises:
        ValueError: a setting does not apply to the laboratory, or a training run has this name.
    """
    run = asked.run
    _refuse(run)
    device = find_device(run.device)
    on_cpu = device.kind == "cpu"
    _refuse_large_cap(asked, device)
    _refuse_offload(asked, device)
    if asked.lab.bandwidth_gbps and on_cpu:
        network.require_tools()
    small: dict[str, object] = {"max_steps": _STEPS}
    if run.training.shard_group is not None:
        small["zero_stage"] = max(asked.lab.stages)  # the plan is of a stage that has groups
    if on_cpu and run.model == ModelChoice():
        chosen = run.training.model_fields_set
        has_batch = any(getattr(run.training, name) for name in _BATCH if name in chosen)
        small |= {k: v for k, v in _SMALL.items() if not (has_batch and k in _BATCH)}
        run = run.replace(model=ModelChoice(**_SHAPE))
    if run.data == CorpusConfig():
        run = run.replace(data=CorpusConfig(data_mode="synthetic"))
        if run.tokenizer == TokenizerConfig():
            run = run.replace(tokenizer=TokenizerConfig(vocab_size=512))
    given = {
        name: value
        for name in run.training.model_fields_set
        if (value := getattr(run.training, name)) is not None
    }
    run = run.replace(training=type(run.training)(**small | given))
    if run.run_name is None:
        identity = {name: str(value) for name, value in flat(run.model_dump()).items()}
        del identity["cache_dir"], identity["log_to"], identity["register_"]
        run = run.replace(run_name=f"zero-lab-{artifacts.fingerprint(identity)[:6]}")
    return run


def _refuse_large_cap(asked: ZeroLabRun, device: Device) -> None:
    """
    Raises:
        ValueError: the cap on the memory of a rank is more than the memory of the machine.
    """
    if (cap := asked.lab.cap_bytes) is None:
        return
    ranks = asked.run.training.ranks if device.kind == "cpu" else 1  # they share the memory
    usable = int(USABLE * device.memory_bytes / ranks)
    if cap > usable:
        raise ValueError(
            f"--memory-gb is {asked.lab.memory_gb:g}, but a rank can use {usable / 1e9:.3g} of the "
            f"{device.memory_bytes / 1e9:.3g} GB of {device.name}: lower it"
        )


def _refuse_offload(asked: ZeroLabRun, device: Device) -> None:
    if asked.lab.offload == "none":
        return
    if device.kind == "cpu":
        raise ValueError(
            f"--offload {asked.lab.offload} moves state from the memory of a GPU to that of the "
            f"host, but the device is a CPU ({device.name}): drop it"
        )


def _refuse(run: RunConfig) -> None:
    refuse_one_rank(run, "the laboratory")
    if run.training.nodes > 1:
        raise ValueError("the laboratory measures the ranks of one machine: drop --nodes")
    if run.training.zero_stage is not None:
        raise ValueError("the laboratory sets --zero-stage itself: use --zero-stages")
    if run.training.reshard_group is not None:
        raise ValueError("the laboratory does not measure --reshard-group: drop it")
    if run.training.offload != "none":
        raise ValueError(
            "the laboratory measures its stages with and without offloaded state: set offload "
            "in lab, not in run.training"
        )
    if run.overfit != OverfitConfig() or run.skip_preflight:
        raise ValueError(
            "the laboratory has no pre-flight and no overfit check: drop --skip-preflight, "
            "--overfit-steps and --overfit-loss"
        )
    if run.evaluation.is_asked_for:
        raise ValueError(
            "the laboratory has no evaluation: drop --evaluate-path, --evaluate-tasks and "
            "--evaluate-core-path"
        )
    if run.trackers:
        raise ValueError("the laboratory has no curves of training: drop --log-to")
    if run.register_:
        raise ValueError("the laboratory has no model to register: drop --register")
    if run.run_name and run.folder.checkpoints.exists():
        raise ValueError(
            f"{run.run_name} is a training run: give the laboratory another --run-name"
        )

"""Settings of a proof that resume is exact."""

from typing import ClassVar, Self

from zeroflow import artifacts
from zeroflow.checks.overfit import OverfitConfig
from zeroflow.checks.resume import ProofConfig
from zeroflow.config import Config
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.device import find_device
from zeroflow.reuse import flat
from zeroflow.settings.run_config import EvaluationChoice, ModelChoice, RunConfig

_STEPS = 60
"""Default number of steps: enough for several checkpoints and validations between kills."""

# Defaults that make both training runs take about a minute on a CPU
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}

_SMALL = {"seq_len": 64, "validation_tokens": 4096}

_BATCH = ("batch_size", "grad_accum_steps", "batch_tokens")
"""Settings that define the batch. If any is given, the batch has no default here."""


class ProofRun(Config):
    """Settings of the proof, and of the run whose resume it tests."""

    proof: ProofConfig = ProofConfig()
    run: RunConfig = RunConfig()

    no_flags: ClassVar[tuple[str, ...]] = (
        "run.sweep",
        "run.skip_preflight",
        "run.register_",
        *(f"run.overfit.{name}" for name in OverfitConfig.model_fields),
        *(f"run.evaluation.{name}" for name in EvaluationChoice.model_fields),
    )
    """Settings that do not apply to a proof."""

    @property
    def anywhere(self) -> Self:
        """Return the same settings with absolute paths."""
        return self.model_copy(update={"run": self.run.anywhere})


def settings(asked: RunConfig) -> RunConfig:
    """Return the settings of the run that a proof trains; the defaults are small and fast.

    Raises:
        ValueError: a setting does not apply to a proof, or a training run has this name.
    """
    if asked.overfit != OverfitConfig():
        raise ValueError("a proof has no overfit check: drop --overfit-steps and --overfit-loss")
    if asked.evaluation.is_asked_for:
        raise ValueError(
            "a proof has no evaluation: drop --evaluate-path, --evaluate-tasks and "
            "--evaluate-core-path"
        )
    if asked.register_:
        raise ValueError("a proof has no model to register: drop --register")
    if asked.skip_preflight:
        raise ValueError("a proof has no pre-flight: drop --skip-preflight")
    if asked.run_name and asked.folder.checkpoints.exists():
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
        # Otherwise results on a GPU differ between runs, even without kills
        training["deterministic"] = True
    if asked.data == CorpusConfig():
        asked = asked.replace(data=CorpusConfig(data_mode="synthetic"))
        if asked.tokenizer == TokenizerConfig():
            asked = asked.replace(tokenizer=TokenizerConfig(vocab_size=512))
    run = asked.replace(training=type(asked.training)(**training | given))
    if run.run_name is None:
        identity = {name: str(value) for name, value in flat(run.model_dump()).items()}
        del identity["cache_dir"], identity["log_to"], identity["register_"]
        run = run.replace(run_name=f"proof-{artifacts.fingerprint(identity)[:6]}")
    return run

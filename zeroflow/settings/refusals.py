"""Refuse settings that contradict each other or the device, before anything is done."""

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TRAINED_TOKENIZER, TokenizerConfig
from zeroflow.device import Device
from zeroflow.settings.defaults import nominal_workload
from zeroflow.settings.run_config import RunConfig

# Settings that only some kinds of data read
_READ_BY_DATA = {
    "fineweb_subset": ("auto", "fineweb"),
    "text_column": ("auto", "fineweb", "hub", "files"),
    "bad_lines_limit": ("hub", "files"),
    "deduplicate": ("auto", "fineweb", "hub", "files", "sample"),
    "allow_synthetic_fallback": ("auto", "fineweb"),
}


def refuse_what_does_nothing(asked: RunConfig) -> None:
    """
    Raises:
        ValueError: a setting has no effect with the data or the tokenizer.
    """
    data, tokenizer = asked.data, asked.tokenizer
    for name, modes in _READ_BY_DATA.items():
        default = CorpusConfig.model_fields[name].default
        if data.data_mode not in modes and getattr(data, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing with --data-mode {data.data_mode}, only "
                f"with {', '.join(modes)}: drop one of them"
            )
    trained = tokenizer.tokenizer_name in ("auto", TRAINED_TOKENIZER, SYNTHETIC_TOKENIZER)
    if not trained and tokenizer.vocab_size != TokenizerConfig.model_fields["vocab_size"].default:
        raise ValueError(
            f"--vocab-size does nothing with --tokenizer-name {tokenizer.tokenizer_name}, which "
            "has its own: drop it, or use --tokenizer-name train"
        )
    if tokenizer.end_of_text and tokenizer.tokenizer_name == TRAINED_TOKENIZER:
        raise ValueError(
            "--end-of-text does nothing with --tokenizer-name train, which has its own: drop it"
        )


def refuse_what_the_device_cannot(run: RunConfig, device: Device) -> None:
    """
    Raises:
        ValueError: the device lacks what a setting needs.
    """
    choice = run.training
    nominal_workload(run, device).require_fp8(device)
    if choice.zero_stage and (choice.gpus or 1) == 1:
        raise ValueError(
            f"--zero-stage {choice.zero_stage} shards state over several GPUs, and there is one: "
            "add --gpus, or drop it"
        )

"""Refuse settings that contradict each other or the device, before anything is done."""

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import SYNTHETIC_TOKENIZER, TRAINED_TOKENIZER, TokenizerConfig
from zeroflow.device import FP8_CAPABILITY, Device, Precision
from zeroflow.model.fp8 import MULTIPLE
from zeroflow.model.llama import Shape
from zeroflow.settings.run_config import RunConfig


def require_fp8(
    device: Device, shape: Shape, *, seq_len: int | None, precision: Precision | None
) -> None:
    """Check that products can be computed in 8 bits; None stands for a GPU's default.

    Raises:
        ValueError: they cannot.
    """
    needed = ".".join(map(str, FP8_CAPABILITY))
    if device.capability is None:
        raise ValueError(
            f"--fp8 needs a GPU of compute capability {needed} or more, and the device is a CPU "
            f"({device.name}): train on such a GPU, or drop --fp8"
        )
    if device.capability < FP8_CAPABILITY:
        raise ValueError(
            f"--fp8 needs compute capability {needed} or more, as Ada and Hopper have it, and "
            f"{device.name} has {'.'.join(map(str, device.capability))}: train on another GPU, or "
            "drop --fp8"
        )
    if precision == "fp32":
        raise ValueError("--fp8 goes with bf16, and --precision is fp32: drop one of them")
    sides = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "the joined size of queries, keys and values": shape.qkv_size,
        "seq_len": seq_len or MULTIPLE,
    }
    for name, side in sides.items():
        if side % MULTIPLE:
            raise ValueError(
                f"--fp8 multiplies matrices whose sides are multiples of {MULTIPLE}, and {name} "
                f"is {side}: change it, or drop --fp8"
            )


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
    if choice.fp8:
        require_fp8(device, run.model.shape, seq_len=choice.seq_len, precision=choice.precision)
    if choice.zero_stage and (choice.gpus or 1) == 1:
        raise ValueError(
            f"--zero-stage {choice.zero_stage} shards state over several GPUs, and there is one: "
            "add --gpus, or drop it"
        )

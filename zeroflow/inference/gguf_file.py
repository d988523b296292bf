"""Export of a model to a GGUF file, for llama.cpp and the programs that use it.

llama.cpp does not read the pre-tokenizer of a tokenizer.json. It has a list of pre-tokenizers, and
a GGUF file names one of them. A wrong name silently gives other ids. So the name is derived from
the pre-tokenizer itself, and a tokenizer with another pre-tokenizer is refused.

Source: https://github.com/ggml-org/llama.cpp, conversion/base.py and src/llama-vocab.cpp
"""

import importlib.util
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import tokenizers
from torch import Tensor

from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.llama import Llama, ModelConfig

if TYPE_CHECKING:
    from gguf import MODEL_ARCH, GGUFWriter

log = logging.getLogger(__name__)

TokenizerJson: TypeAlias = dict[str, Any]
"""The content of a tokenizer.json, whose parts have many forms."""


class _PreTokenizer(NamedTuple):
    """A pre-tokenizer of llama.cpp."""

    name: str
    """Value of `tokenizer.ggml.pre`."""

    ignores_merges: bool
    """True if a word that is in the vocabulary is one token, whatever the merges give."""


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS = "single digits"

_PRE_TOKENIZERS: dict[tuple[str, ...], tuple[_PreTokenizer, ...]] = {
    # Llama 3, and every tokenizer that zeroflow trains
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",): (
        _PreTokenizer("llama-bpe", ignores_merges=True),
        _PreTokenizer("smaug-bpe", ignores_merges=False),
    ),
    # Qwen 2 and 3
    (rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",): (
        _PreTokenizer("qwen2", ignores_merges=False),
    ),
    (_GPT_2,): (_PreTokenizer("gpt-2", ignores_merges=False),),
    (_DIGITS, _GPT_2): (_PreTokenizer("smollm", ignores_merges=False),),
}
"""Pre-tokenizers of llama.cpp that give the same words, by the patterns that split a text."""


def require_gguf() -> None:
    """
    Raises:
        ValueError: the package gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("--format gguf needs the package gguf: pip install 'zeroflow[gguf]'")


def write(model: Llama, tokenizer: Tokenizer, file: Path, *, name: str, context: int) -> None:
    """Write `model` and its tokenizer as a GGUF file with fp32 weights.

    The ids that only pad the vocabulary are left out.

    Args:
        name: name of the model.
        context: context length in training, in tokens.

    Raises:
        ValueError: llama.cpp would give a text other ids than those that the model was trained on,
            or there is no tokenizer.
    """
    require_gguf()
    from gguf import MODEL_ARCH_NAMES, GGUFWriter

    if tokenizer.path is None:
        raise ValueError("a GGUF file needs a tokenizer, and synthetic data has none: export to hf")
    content: TokenizerJson = json.loads(tokenizer.load().to_str())
    pre = pre_tokenizer(content)
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[_architecture(model.config)])
    writer.add_name(name)
    _add_shape(writer, model.config, context, tokenizer.vocab_size)
    _add_tokenizer(writer, content, tokenizer, pre)
    for tensor_name, tensor in _tensors(model, tokenizer.vocab_size):
        writer.add_tensor(tensor_name, tensor.detach().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    log.info("llama.cpp's pre-tokenizer is %s", pre)


def pre_tokenizer(content: TokenizerJson) -> str:
    """Return the name of llama.cpp's pre-tokenizer that gives the same ids as a tokenizer.json.

    Args:
        content: the content of tokenizer.json.

    Raises:
        ValueError: llama.cpp has no such pre-tokenizer, or the tokenizer is not a byte-level BPE.
    """
    model, normalizer = content["model"], content["normalizer"]
    patterns = _patterns(content["pre_tokenizer"])
    if model["type"] != "BPE" or model.get("byte_fallback") or patterns is None:
        raise ValueError(
            "only a byte-level BPE can be exported to GGUF, and this tokenizer is of another kind "
            f"({model['type']}): export to hf"
        )
    if normalizer and normalizer["type"] != "NFC":
        raise ValueError(
            f"the tokenizer changes texts before it splits them ({normalizer['type']}), which "
            "llama.cpp does not: export to hf"
        )
    if normalizer:
        log.warning(
            "llama.cpp does not compose characters as the tokenizer does (NFC): normalise texts "
            "with combining characters yourself"
        )
    ignores = bool(model.get("ignore_merges"))
    for known in _PRE_TOKENIZERS.get(patterns, ()):
        if known.ignores_merges == ignores or _merges_make_every_token(content):
            return known.name
    raise ValueError(
        f"llama.cpp has no pre-tokenizer that splits texts like this tokenizer: {patterns}. "
        "Export to hf"
    )


def _patterns(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """Return the patterns that split a text, one after the other; None if it is not byte-level."""
    parts = pre_tokenizer["pretokenizers"] if (pre_tokenizer or {}).get("pretokenizers") else None
    found, byte_level = [], False
    for part in parts or [pre_tokenizer]:
        match part:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} if not part[
                "invert"
            ]:
                found.append(regex)
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False}:
                byte_level = True
                if part.get("use_regex", True):
                    found.append(_GPT_2)
            case _:
                return None
    return tuple(found) if byte_level else None


def _merges_make_every_token(content: TokenizerJson) -> bool:
    """Return True if it makes no difference whether words of the vocabulary ignore the merges."""
    added = {token["content"] for token in content["added_tokens"]}
    model = tokenizers.models.BPE(
        vocab=content["model"]["vocab"],
        merges=[tuple(merge) for merge in content["model"]["merges"]],
    )
    return all(
        len(model.tokenize(token)) == 1 for token in content["model"]["vocab"] if token not in added
    )


def _architecture(shape: ModelConfig) -> "MODEL_ARCH":
    from gguf import MODEL_ARCH

    return MODEL_ARCH.QWEN3 if shape.qk_norm else MODEL_ARCH.LLAMA


def _add_shape(writer: "GGUFWriter", shape: ModelConfig, context: int, vocab_size: int) -> None:
    from gguf import LlamaFileType

    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_vocab_size(vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)


def _add_tokenizer(
    writer: "GGUFWriter", content: TokenizerJson, tokenizer: Tokenizer, pre: str
) -> None:
    from gguf import TokenType

    names = [f"[UNUSED{id_}]" for id_ in range(tokenizer.vocab_size)]
    types = [TokenType.UNUSED] * tokenizer.vocab_size
    for token, id_ in content["model"]["vocab"].items():
        names[id_], types[id_] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        names[added["id"]], types[added["id"]] = added["content"], kind
    end = tokenizer.end_of_text
    types[end] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    # As in training, every text follows an end-of-text token. Without an id for the end of a turn,
    # llama.cpp would look for one among the names of the tokens
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _tensors(model: Llama, vocab_size: int) -> Iterable[tuple[str, Tensor]]:
    """Yield the weights by their names in GGUF; a tied output matrix is the token embedding."""
    from gguf import get_tensor_name_map

    shape = model.config
    names = get_tensor_name_map(_architecture(shape), shape.num_hidden_layers)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    if shape.qk_norm:
        heads = {}  # for Qwen3, llama.cpp rotates halves as this decoder does
    for name, weight in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, f"GGUF has no name for {name}"
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            yield found, weight[:vocab_size]
        elif (projection := name.split(".")[-2]) in heads:
            yield found, _interleaved(weight, heads[projection])
        else:
            yield found, weight


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head: for LLaMA, llama.cpp rotates neighbouring features."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)

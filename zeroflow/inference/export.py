"""Export of a model to a folder that `transformers` or llama.cpp opens.

Without further settings, the folder behaves as in training: it gives the token ids of the shards,
has the same end-of-text id, and begins prompts after an end-of-text token, as documents do.
"""

import json
import logging
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.data import encoding
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.inference import gguf_file
from zeroflow.model.hugging_face import as_hugging_face
from zeroflow.model.llama import Llama
from zeroflow.training.sampling import SamplingConfig

log = logging.getLogger(__name__)

Format = Literal["hf", "gguf"]
"""hf: a folder for transformers and vLLM. gguf: a file for llama.cpp and Ollama."""

SHARD_BYTES = 5_000_000_000
"""Maximum size of a file of weights in the format of Hugging Face."""

_PARTIAL = ".partial"
"""Folder for files of an export that is not complete yet."""


def export(
    model: Llama,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    context: int,
    name: str = "model",
    format: Format = "hf",
    card: str = "",
) -> None:
    """Write `model` with its tokenizer into a new `folder`.

    Args:
        context: context length in training, in tokens.
        name: name of the model, and of the file in format gguf.
        card: content of README.md, the model card.

    Raises:
        ValueError: as `require_new` does, or the programs that open the format would encode a text
            to other ids than those that the model was trained on.
    """
    require_new(folder)
    with _all_or_nothing(folder) as partial:
        if format == "gguf":
            file = partial / f"{name}.gguf"
            gguf_file.write(model, tokenizer, file, name=name, context=context)
        else:
            _write_model(model, tokenizer, partial, context)
            if tokenizer.path is not None:
                _write_tokenizer(tokenizer, partial, context)
                _require_same_ids(tokenizer, partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    log.info("exported to %s", folder)


def require_new(folder: Path) -> None:
    """
    Raises:
        ValueError: `folder` exists and is not empty, is a file or below one, or nothing can be
            written there.
    """
    artifacts.require_possible_folder(folder, "--out")
    if folder.exists() and any(path.name != _PARTIAL for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for --out")


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[Path]:
    """Yield a folder whose files move into `folder` when the block ends without an error."""
    partial = folder / _PARTIAL  # not beside `folder`, which may be on another disk than its parent
    shutil.rmtree(partial, ignore_errors=True)
    existed = folder.exists()
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}): name another --out"
        ) from error
    try:
        yield partial
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()
    except BaseException as error:
        shutil.rmtree(partial if existed else folder, ignore_errors=True)
        if _is_lack_of_room(error):
            raise ValueError(
                f"there is no room for the exported model in {folder} ({error}): free some space, "
                "or name another --out. Nothing of it is left there"
            ) from error
        raise


def _is_lack_of_room(error: BaseException) -> bool:
    """Return True for a full disk, an exhausted quota or a limit, as each library reports it."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is None:
        return "requested and" in text and "written" in text  # NumPy
    number = re.search(r"\(os error (\d+)\)", text)  # safetensors
    found = int(number[1]) if number else getattr(error, "errno", None)
    return found in artifacts.NO_ROOM


def _write_model(model: Llama, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    from transformers import GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    end = tokenizer.end_of_text
    network = as_hugging_face(model, context=context, end_of_text=end)
    sampling = SamplingConfig()  # as `zeroflow generate` samples by default
    network.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        max_new_tokens=sampling.tokens,
        # ids that only pad the vocabulary and were never trained
        suppress_tokens=list(range(tokenizer.vocab_size, model.config.vocab_size)) or None,
    )
    network.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    # safetensors writes files that only their owner can read
    readable = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for weights_file in folder.glob("*.safetensors"):
        weights_file.chmod(readable)


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write a complete tokenizer.json, and settings that do not change it.

    The original settings may name a class such as GPT2Tokenizer. transformers 5 would then use the
    pre-tokenizer of that class instead of the one in tokenizer.json.
    """
    loaded = tokenizer.load()
    end, token = tokenizer.end_of_text, loaded.id_to_token(tokenizer.end_of_text)
    assert token is not None, "its id was looked up by its text"
    content: dict[str, object] = json.loads(loaded.to_str())
    content["post_processor"] = _begin_with(end, token)
    content["decoder"] = _with_first_space(content["decoder"])
    artifacts.write_json(folder / "tokenizer.json", content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "pad_token": token,
        "split_special_tokens": True,  # special tokens spelled out in a text are encoded as text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    artifacts.write_json(folder / "tokenizer_config.json", settings)


def _begin_with(end: int, token: str) -> JsonObject:
    """Return the post-processor that adds an end-of-text token before a text, or each of a pair."""
    # The template has its own name for the token, whose text may contain characters of its syntax
    name = "end_of_text"
    token_first: JsonObject = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = (
        [token_first, JsonObject(Sequence={"id": which, "type_id": 0})] for which in "AB"
    )
    return {
        "type": "TemplateProcessing",
        "single": [*first],
        "pair": [*first, *second],
        "special_tokens": {name: {"id": name, "ids": [end], "tokens": [token]}},
    }


def _with_first_space(decoder: Any) -> Any:
    """A decoder that keeps the space before the first word.

    transformers' text generation decodes the new tokens by themselves, where that space belongs.
    """
    match decoder:
        case None:  # tokens are joined by spaces
            return _sequence(_replace(_START, " "))
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            inner = rf"{_START}{re.escape(prefix)}"
            clean = (_replace(text, short) for text, short in _CLEANUP) if cleanup else ()
            return _sequence(
                _replace(rf"{_START}(?!{re.escape(prefix)})", " "), _replace(inner, ""), *clean
            )
        case {"type": "BPEDecoder", "suffix": suffix}:  # a space after each word but the last
            fuse: JsonObject = {"type": "Fuse"}
            spaces = _replace(re.escape(suffix), " ")
            # Not a Strip decoder, which panics on an empty text
            return _sequence(spaces, fuse, _replace(r" \z", ""), _replace(_START, " "))
        case {"type": "Metaspace"}:
            return decoder | {"prepend_scheme": "never"}
        case {"type": "Strip"}:
            return decoder | {"start": 0}
        case {"type": "Sequence", "decoders": list(decoders)}:
            return decoder | {"decoders": list(map(_with_first_space, decoders))}
    return decoder


_START = r"\A"

_CLEANUP = (
    *((rf"{_START} {re.escape(mark)}", mark) for mark in (".", "?", "!", ",")),
    *((rf"{_START} {end}", end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
"""Strings that the WordPiece decoder replaces in each token, which here begins with its space. Its
other replacements need more than one word in a token.

Source: https://github.com/huggingface/tokenizers, decoders/wordpiece.rs
"""


def _replace(pattern: str, content: str) -> JsonObject:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _sequence(*decoders: JsonObject) -> JsonObject:
    return {"type": "Sequence", "decoders": list(decoders)}


def _require_same_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Check that transformers encodes difficult strings to the same ids as the shards have.

    Raises:
        ValueError: the ids of a string differ.
    """
    from transformers import AutoTokenizer

    special = [t.content for t in tokenizer.load().get_added_tokens_decoder().values()]
    texts = encoding.hard_strings(special)
    flat, lengths = tokenizer.load_encoder().encode(texts)
    ours = np.split(flat, np.cumsum(lengths)[:-1])
    opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = opened(texts, verbose=False)["input_ids"]
    for text, expected, found in zip(texts, ours, theirs, strict=True):
        # A document whose ids contain the end-of-text id is refused, so shards have none
        if tokenizer.end_of_text in expected:
            continue
        if found != [tokenizer.end_of_text, *expected.tolist()]:
            raise ValueError(
                f"transformers would give other ids to {text[:60]!r} ({found[1:9]}...) than those "
                f"of the training data ({expected[:8].tolist()}...), so {tokenizer.name} cannot be "
                "exported"
            )

"""Text generation with a key/value cache, from a model in the format of transformers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroflow.data.tokenizer import Tokenizer
from zeroflow.data.tokenizer_files import require_vocabulary
from zeroflow.model.hugging_face import as_hugging_face
from zeroflow.model.llama import Llama
from zeroflow.text.markup import is_utf8, visible
from zeroflow.training import sampling
from zeroflow.training.sampling import SamplingConfig

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin")
"""Suffixes of files of weights."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded in place of a character whose last bytes are in the next tokens."""


@dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer, which continue texts."""

    network: Any
    """A causal language model of transformers."""

    encode: Callable[[str], list[int]]
    """Returns the ids of a prompt, with the token that begins texts."""

    decode: Callable[[list[int]], str]

    ends: frozenset[int]
    """Tokens that end a text."""

    vocab_size: int
    """Ids from this one on are not those of tokens; they pad the vocabulary."""

    context: int
    """Context length in training, in tokens."""

    def stream(
        self, prompt: str, config: SamplingConfig, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Return the text that follows `prompt`, in pieces that are generated on demand.

        A character whose bytes are in several tokens is in one piece.

        Args:
            stop: the text ends before the first occurrence of one of these.

        Raises:
            ValueError: the prompt or a stop text cannot be used.
        """
        for what, text in (("prompt", prompt), *(("stop text", each) for each in stop)):
            if not is_utf8(text):
                raise ValueError(f"the {what} {visible(text)} is not UTF-8: encode it as UTF-8")
        if not all(stop):
            raise ValueError("a text to stop at is empty: drop it, or write what should end a text")
        return self._pieces(self.encode(prompt), config, stop)

    def _pieces(self, ids: list[int], config: SamplingConfig, stop: Sequence[str]) -> Iterator[str]:
        next_logits = _Cached(self.network, self.context, self.vocab_size)
        # Decoded together with the prompt: a decoder may add a space depending on the token before
        before, added, text, shown = len(self.decode(ids)), list[int](), "", 0
        for token in sampling.sample(next_logits, ids, config, ends=self.ends):
            added.append(token)
            text = self.decode(ids + added)[before:]
            found = [text.index(each) for each in stop if each in text]
            complete = min(found) if found else _complete(text, stop)
            if shown < complete:
                yield text[shown:complete]
                shown = complete
            if found:
                return
        if text[shown:]:
            yield text[shown:]

    def generate(self, prompt: str, config: SamplingConfig, stop: Sequence[str] = ()) -> str:
        """Return the text that follows `prompt`; arguments and errors are those of `stream`."""
        return "".join(self.stream(prompt, config, stop))


def _complete(text: str, stop: Sequence[str]) -> int:
    """Return the length of the part of `text` that the next tokens cannot change or cut off."""
    kept = len(text.rstrip(_INCOMPLETE))
    begun = (
        start
        for each in stop
        for start in range(max(0, len(text) - len(each) + 1), len(text))
        if each.startswith(text[start:])
    )
    return min([kept, *begun])


class _Cached:
    """Logits after a growing text; keys and values of earlier tokens are kept.

    If the text exceeds the context, the model continues with the newest half of the context.
    """

    def __init__(self, network: Any, context: int, vocab_size: int) -> None:
        self._network, self._context, self._vocab_size = network, context, vocab_size
        self._cache: Any = None
        self._begin = self._done = 0

    # The newest half, because after every cut all remaining tokens are recomputed: their keys
    # and values depend on those that are left out
    @torch.no_grad()
    def __call__(self, ids: list[int]) -> Tensor:
        if len(ids) - self._begin > self._context:
            self._begin = self._done = len(ids) - max(1, self._context // 2)
            self._cache = None
        new = torch.tensor([ids[self._done :]], device=self._network.device)
        given = self._network(new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._done = given.past_key_values, len(ids)
        logits: Tensor = given.logits[0, -1, : self._vocab_size]
        return logits.float().cpu()


def remark_on(prompt: str) -> None:
    """Log a warning if the text would usually be better without the end of `prompt`."""
    if prompt.endswith(" "):
        log.warning(
            "the prompt ends with a space, which most tokenizers join to the next word: the text "
            "is usually better without it"
        )


def of_model(model: Llama, tokenizer: Tokenizer, *, context: int) -> TextGenerator:
    """Return the generator of a trained model.

    Args:
        context: context length in training, in tokens.
    """
    end = tokenizer.end_of_text
    network = as_hugging_face(model, context=context, end_of_text=end)
    if tokenizer.path is None:

        def encode(prompt: str) -> list[int]:
            if prompt:
                raise ValueError("the model was trained on token ids: drop the prompt")
            return [end]

        def decode(ids: list[int]) -> str:
            return " ".join(map(str, ids[1:]))

    else:
        loaded = tokenizer.load()

        def encode(prompt: str) -> list[int]:
            # Documents of the training data begin after an end-of-text token
            return [end, *loaded.encode(prompt, add_special_tokens=False).ids]

        def decode(ids: list[int]) -> str:
            return loaded.decode(ids[1:], skip_special_tokens=True)

    return TextGenerator(network, encode, decode, frozenset([end]), tokenizer.vocab_size, context)


def of_folder(folder: Path) -> TextGenerator:
    """Return the generator of a model that was exported, or of another one that transformers opens.

    Raises:
        ValueError: the folder has no model with a tokenizer.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model that transformers opens: it has no config.json")
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise ValueError(f"{folder} has no weights (model.safetensors): name another folder")
    require_vocabulary(folder, str(folder))
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # standard output is the text
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"transformers cannot open {folder}: {error}") from error
    end = network.generation_config.eos_token_id  # one, several or none
    ends = frozenset(end if isinstance(end, list) else [] if end is None else [end])
    begin = tokenizer.bos_token_id
    first = [min(ends, default=0) if begin is None else begin]

    def encode(prompt: str) -> list[int]:
        return tokenizer(prompt, verbose=False)["input_ids"] or first

    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, facts in added if facts.special)}

    def decode(ids: list[int]) -> str:
        # Not by the library, whose decoders may fail if all tokens are special
        kept = [token for token in ids if token not in special]
        return str(tokenizer.decode(kept)) if kept else ""

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    context = network.config.max_position_embeddings
    return TextGenerator(network.eval(), encode, decode, ends, vocab_size, context)

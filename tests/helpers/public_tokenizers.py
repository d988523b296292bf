"""Folders of small tokenizers that are shaped like public ones."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

_LINES = [
    "The river runs past the old stone bridge, don't you see? 1234 numbers.\n\tdef f(x): return x",
    "Ünïcode café naïve — “quotes” 日本語 текст 한국어",
    "a b c   multiple   spaces\n\nnew lines\r\n",
] * 50

# Numbers by threes, and a line break with what follows: not the pre-tokenizer of GPT-2's class
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def of_bytes(*special: str) -> Tokenizer:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special or ["<|endoftext|>"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return tokenizer


def like_qwen() -> Tokenizer:
    tokenizer = of_bytes("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


def like_llama_2() -> Tokenizer:
    """A BPE of characters with a space before each word, and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in _LINES], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(content))


def of_words(*words: str) -> Tokenizer:
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def like_bert() -> Tokenizer:
    """WordPiece, whose decoder adds the spaces between words and removes those before marks."""
    letters = sorted({*"".join(_LINES).lower()} - {*" \n\r\t"})
    words = ["[SEP]", "[UNK]", "the", "river", "##s", "##ing", "run", "n't", "'s"]
    pieces = dict.fromkeys([*words, *letters, *(f"##{letter}" for letter in letters)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def like_clip() -> Tokenizer:
    """A BPE whose last piece of a word ends in a mark, which decodes to a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    return tokenizer


def save(
    folder: Path,
    tokenizer: Tokenizer,
    config: dict[str, Any] | None = None,
    special_map: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write the files of a tokenizer; `model` replaces entries of its model."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    content["model"].update(model)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    files = {"tokenizer_config.json": config, "special_tokens_map.json": special_map}
    for name, settings in files.items():
        if settings is not None:
            (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return folder

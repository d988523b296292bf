import json

import pytest
import tokenizers
from shard_sets import (
    ALL,
    SMALL,
)
from tiny import jsonl_corpus
from tokenizers import models, pre_tokenizers, trainers

from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer


def test_id_outside_the_vocabulary_leaves_no_part(text, tmp_path):
    wrong = text.tokenizer.replace(vocab_size=300)
    with pytest.raises(ValueError, match=r"gave id \d+ for document d0.*its tokenizer\.json is"):
        build_shards(SMALL, text.corpus, wrong, tmp_path)
    assert not list((tmp_path / "shards").glob("*/part-*"))


def test_document_that_spells_out_the_end_of_text_is_refused_if_it_is_encoded_as_that_token(
    text, tmp_path
):
    unigram = tokenizers.Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(text.texts, trainer)
    (tmp_path / "unigram").mkdir()
    unigram.save(str(tmp_path / "unigram" / "tokenizer.json"))
    config = TokenizerConfig(tokenizer_name=str(tmp_path / "unigram"))
    tokenizer = fetch_tokenizer(config, text.corpus, tmp_path)
    good = build_shards(SMALL, text.corpus, tokenizer, tmp_path)
    assert good.train.rows
    bad = jsonl_corpus(tmp_path / "bad.jsonl", [*text.texts[:3], "a </s> b"])
    with pytest.raises(ValueError, match="document d3 spells out the token that ends documents"):
        build_shards(SMALL, bad, tokenizer, tmp_path)


def test_unknown_token_that_also_ends_documents_is_named_as_the_cause(text, tmp_path):
    vocabulary = {"</s>": 0, "known": 1}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["</s>"])
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    config = TokenizerConfig(tokenizer_name=str(tmp_path / "words"), end_of_text="</s>")
    tokenizer = fetch_tokenizer(config, text.corpus, tmp_path)
    with pytest.raises(ValueError, match="document d0 contains text that the tokenizer does not k"):
        build_shards(SMALL, text.corpus, tokenizer, tmp_path)


def test_empty_documents_and_bad_lines_are_counted(text, tmp_path):
    good = [json.dumps({"text": document}) for document in text.texts[:9]]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([*good, '{"text": ""}', "no json", '{"text": ""}']))
    corpus = resolve_corpus(
        CorpusConfig(data_mode="files", data_path=(str(file),), bad_lines_limit=1)
    ).corpus
    shards = build_shards(ALL, corpus, text.tokenizer, tmp_path)
    # The end of one of the nine documents is held out, so it is in both splits
    assert (shards.train.documents, shards.validation.documents) == (9, 1)
    assert (shards.empty_documents, shards.bad_lines) == (2, 1)
    with pytest.raises(ValueError, match=r"1 bad line, --bad-lines-limit 0:\n  .*line 11 is not"):
        build_shards(ALL, corpus.replace(bad_lines_limit=0), text.tokenizer, tmp_path)

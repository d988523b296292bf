import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import contents, jsonl_corpus

from zeroflow.data import shards, synthetic, tokenizer
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.shards import Rows, ShardConfig
from zeroflow.data.tokenizer import TokenizerConfig, TokenizerFiles

SYNTHETIC = CorpusConfig(data_mode="synthetic")
SMALL = ShardConfig(seq_len=32, train_rows=50, validation_rows=4, validation_fraction=0.1)


def synthetic_tokens(vocab_size: int) -> TokenizerFiles:
    return tokenizer.fetch(
        TokenizerConfig(tokenizer_name="synthetic", vocab_size=vocab_size), SYNTHETIC, Path()
    )


@pytest.fixture
def few_tokens(monkeypatch):
    """Ask for no more than the settings do, and begin a file every 20 rows."""
    monkeypatch.setattr(shards, "_LEAST_TRAIN_TOKENS", 0)
    monkeypatch.setattr(shards, "_LEAST_VALIDATION_TOKENS", 0)
    monkeypatch.setattr(shards, "_SHARD_TOKENS", 20 * SMALL.row_tokens)


@pytest.fixture
def built(few_tokens, text, tmp_path):
    """All of the sixty documents: more rows are asked for than there are."""
    return shards.build(SMALL.replace(train_rows=10**6, validation_rows=10**6), *text[:2], tmp_path)


def documents(path: Path) -> list[dict]:
    return pq.read_table(path / "documents.parquet").to_pylist()


def stream(path: Path, split: str) -> np.ndarray:
    """All tokens of a split, read by plain pyarrow."""
    files = sorted(path.glob(f"{split}-*.arrow"))
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    return np.array([row for table in tables for row in table["tokens"].to_pylist()]).ravel()


def test_row_leads_back_to_the_text_of_its_documents(built, text):
    loaded = tokenizer.load(text.tokens)
    tokens = {split: stream(built.path, split) for split in ("train", "validation")}
    lines, whole = documents(built.path), 0
    assert {line["id"] for line in lines} == {f"d{number}" for number in range(60)}
    for line in lines:
        start = line["row"] * built.row_tokens + line["offset"]
        ids = tokens[line["split"]][start : start + line["tokens"]]
        document = text.texts[int(line["id"][1:])]
        assert line["bytes"] == len(document.encode())
        if len(ids) < line["tokens"]:  # the last of its split, cut by the last full row
            assert document.startswith(loaded.decode(ids.tolist()[:-1]))
            continue
        assert loaded.decode(ids[:-1].tolist(), skip_special_tokens=False) == document
        assert ids[-1] == text.tokens.end_of_text
        whole += 1
    assert whole >= 58


def test_documents_follow_each_other_without_a_gap(built):
    for split in ("train", "validation"):
        lines = [line for line in documents(built.path) if line["split"] == split]
        starts = [line["row"] * built.row_tokens + line["offset"] for line in lines]
        ends = np.cumsum([line["tokens"] for line in lines])
        assert starts == [0, *ends[:-1].tolist()]
        rows = built.train_rows if split == "train" else built.validation_rows
        assert rows == ends[-1] // built.row_tokens


def test_no_validation_document_is_trained_on(built, text):
    lines = documents(built.path)
    held_out = {line["id"] for line in lines if line["split"] == "validation"}
    trained = {line["id"] for line in lines if line["split"] == "train"}
    assert len(held_out) + len(trained) == 60 and held_out and trained
    assert len(held_out) < 20
    loaded = tokenizer.load(text.tokens)
    read = {
        split: loaded.decode(stream(built.path, split).tolist())
        for split in ("train", "validation")
    }
    for name in trained | held_out:
        marker = f"Marker{int(name[1:]):03}"
        assert (marker in read["train"]) == (name in trained)
        assert (marker in read["validation"]) == (name in held_out)


def test_files_have_the_documented_schema_and_one_batch_each(built):
    files = sorted(built.path.glob("*.arrow"))
    assert len(files) > 3
    for file in files:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        assert reader.num_record_batches == 1
        [field] = reader.schema
        assert field.name == "tokens" and not field.nullable
        assert field.type == pa.list_(pa.field("item", pa.int32(), nullable=False), 33)
        batch = reader.get_batch(0)
        assert batch.num_rows <= 20
        # lies uncompressed in the file: reading a row allocates nothing
        assert batch.column(0).flatten().to_numpy(zero_copy_only=True).dtype == np.int32
    for field in pq.read_schema(built.path / "documents.parquet"):
        assert not field.nullable, field


def test_reader_finds_rows_in_any_file_and_order(built):
    for split in ("train", "validation"):
        expected = stream(built.path, split).reshape(-1, built.row_tokens)
        rows = Rows(built.path, split)
        assert (len(rows), rows.row_tokens) == expected.shape
        ids = np.random.default_rng(0).integers(len(rows), size=100)
        assert np.array_equal(rows[ids], expected[ids])
        ends = np.array([len(rows) - 1, 0])
        assert np.array_equal(rows[ends], expected[ends])


def test_split_without_shards_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no shard of split train"):
        Rows(tmp_path, "train")


def test_description_counts_what_is_there(built, text):
    lines = documents(built.path)
    held_out = [line for line in lines if line["split"] == "validation"]
    assert built.documents == len(lines) == 60
    bytes_, tokens = (sum(line[key] for line in held_out) for key in ("bytes", "tokens"))
    assert built.validation_bytes_per_token == bytes_ / tokens
    assert built.entropy is None
    assert shards.describe(built.path, reused=False) == built


def test_exactly_the_rows_asked_for_are_kept(few_tokens, text, tmp_path):
    built = shards.build(SMALL, *text[:2], tmp_path)
    assert (built.train_rows, built.validation_rows) == (50, 4)
    assert len(Rows(built.path, "train")) == 50 and len(Rows(built.path, "validation")) == 4


def test_document_longer_than_all_rows_asked_for_is_cut(few_tokens, text, tmp_path):
    long = " ".join(text.texts[1:])
    corpus = jsonl_corpus(tmp_path / "long.jsonl", [text.texts[0], long])
    built = shards.build(SMALL.replace(train_rows=25), corpus, text.tokens, tmp_path / "cache")
    [line] = [line for line in documents(built.path) if line["split"] == "train"]
    assert line["tokens"] > 100 * SMALL.row_tokens
    assert built.train_rows == len(Rows(built.path, "train")) == 25


def test_shorter_runs_share_their_shards(text, tmp_path):
    first = shards.build(SMALL, *text[:2], tmp_path)
    again = shards.build(SMALL.replace(train_rows=7, validation_rows=1), *text[:2], tmp_path)
    assert not first.reused and again == first.replace(reused=True)


@pytest.mark.parametrize(
    ("token_type", "vocab_size"), [("int32", 70_000), ("uint16", 65_536), ("uint16", 300)]
)
def test_ids_up_to_the_highest_are_kept_in_either_type(
    few_tokens, token_type, vocab_size, tmp_path
):
    config = SMALL.replace(token_type=token_type)
    built = shards.build(config, SYNTHETIC, synthetic_tokens(vocab_size), tmp_path, seed=3)
    rows = Rows(built.path, "train")[np.arange(50)]
    assert rows.dtype == np.dtype(token_type)
    assert rows.max() == vocab_size - 1
    documents_ = synthetic.documents(vocab_size, 3)
    trained = {line["id"] for line in documents(built.path) if line["split"] == "train"}
    tokens = []
    while len(tokens) < rows.size:
        document = next(documents_)
        tokens += document.tokens.tolist() if document.id in trained else []
    assert rows.ravel().tolist() == tokens[: rows.size]
    assert built.entropy == synthetic.entropy_rate(vocab_size)
    assert built.validation_bytes_per_token is None


def test_vocabulary_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    config = SMALL.replace(token_type="uint16")
    with pytest.raises(ValueError, match=r"65537 tokens, more than uint16.*--token-type int32"):
        shards.build(config, SYNTHETIC, synthetic_tokens(65_537), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_id_outside_the_vocabulary_leaves_no_shards(text, tmp_path):
    with pytest.raises(ValueError, match=r"its tokenizer\.json is wrong"):
        shards.build(SMALL, text.corpus, text.tokens.replace(vocab_size=300), tmp_path)
    assert not [path for path in (tmp_path / "shards").iterdir() if path.is_dir()]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3])
def test_corpus_of_a_few_documents_is_held_out_from_as_well(text, tmp_path, count, fraction):
    few = jsonl_corpus(tmp_path / "few.jsonl", text.texts[:count])
    config = SMALL.replace(validation_fraction=fraction)
    built = shards.build(config, few, text.tokens, tmp_path / "cache")
    assert built.validation_rows >= 1 and built.train_rows >= 1
    splits = [line["split"] for line in documents(built.path)]
    assert sorted(set(splits)) == ["train", "validation"] and len(splits) == count


@pytest.mark.parametrize(
    ("texts", "split"), [(["one document " * 99], "validation"), (["a b", "c d"], "train")]
)
def test_too_small_corpus_is_refused_with_what_to_do(text, tmp_path, texts, split):
    small = jsonl_corpus(tmp_path / "small.jsonl", texts)
    with pytest.raises(ValueError, match=rf"too small: .* for {split} .*--seq-len"):
        shards.build(SMALL, small, text.tokens, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()]


def flip_a_bit(folder: Path) -> None:
    file = folder / "train-00000.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "train-00000.arrow"
    file.write_bytes(file.read_bytes()[:-64])


DAMAGES = {
    "bit flip": flip_a_bit,
    "truncated": truncate,
    "missing": lambda folder: (folder / "validation-00000.arrow").unlink(),
    "extra": lambda folder: (folder / "train-00099.arrow").write_bytes(b"x"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"files": {'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_set_aside_and_rebuilt_to_the_same_bytes(
    few_tokens, text, tmp_path, damage
):
    built = shards.build(SMALL, *text[:2], tmp_path)
    before = contents(built.path)
    assert shards.build(SMALL, *text[:2], tmp_path).reused
    DAMAGES[damage](built.path)
    damaged = contents(built.path)
    assert damaged != before

    again = shards.build(SMALL, *text[:2], tmp_path)
    assert not again.reused and again == built
    assert contents(built.path) == before
    assert contents(built.path.with_name(built.path.name + ".damaged-1")) == damaged


def test_same_settings_give_the_same_bytes(built, few_tokens, text, tmp_path):
    config = SMALL.replace(train_rows=10**6, validation_rows=10**6)
    twin = shards.build(config, *text[:2], tmp_path / "elsewhere")
    assert twin.path.name == built.path.name
    assert contents(twin.path) == contents(built.path)


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 33},
        {"validation_fraction": 0.5},
        {"token_type": "uint16"},
        {"train_rows": 51},
        {"validation_rows": 5},
    ],
)
def test_each_setting_that_changes_the_bytes_changes_the_name(few_tokens, text, tmp_path, change):
    first = shards.build(SMALL, *text[:2], tmp_path)
    other = shards.build(SMALL.replace(**change), *text[:2], tmp_path)
    assert other.path != first.path and not other.reused


def test_seed_counts_for_synthetic_data_only(few_tokens, text, tmp_path):
    def path(corpus, tokens, seed):
        return shards.build(SMALL, corpus, tokens, tmp_path, seed=seed).path

    assert path(*text[:2], 0) == path(*text[:2], 1)
    tokens = synthetic_tokens(300)
    assert path(SYNTHETIC, tokens, 0) != path(SYNTHETIC, tokens, 1)


BUILD = """
import sys
from pathlib import Path
from zeroflow.data import shards
from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.tokenizer import TokenizerFiles

config, corpus, tokens, cache = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
built = shards.build(
    shards.ShardConfig.model_validate_json(config),
    CorpusConfig.model_validate_json(corpus),
    TokenizerFiles.model_validate_json(tokens),
    Path(cache),
)
print(built.model_dump_json())
"""


def test_two_processes_at_once_build_once_and_both_succeed(text, tmp_path):
    settings = [part.model_dump_json() for part in (SMALL, *text[:2])]
    command = [sys.executable, "-c", BUILD, *settings, str(tmp_path / "both")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    built = [shards.ShardSet.model_validate_json(answer) for answer in answers]
    assert sorted(answer.reused for answer in built) == [False, True]

    alone = shards.build(SMALL, *text[:2], tmp_path / "alone")
    [folder] = [path for path in (tmp_path / "both" / "shards").iterdir() if path.is_dir()]
    assert contents(folder) == contents(alone.path)

"""Tiny real objects for all tests: models, corpora, rows, jobs."""

import json
import shutil
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch

from zeroflow.data.batches import MicroBatch, to_micro_batch
from zeroflow.data.build import build_shards
from zeroflow.data.corpus import CorpusConfig, resolve_corpus
from zeroflow.data.documents import Document
from zeroflow.data.shards import ShardConfig, ShardSet
from zeroflow.data.slices import read_documents
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig
from zeroflow.data.tokenizer_origins import fetch_tokenizer
from zeroflow.model.llama import Llama, ModelConfig, Shape, initialize
from zeroflow.reuse import StageResult
from zeroflow.tracking.config import TrackingConfig
from zeroflow.training.config import TrainingConfig
from zeroflow.training.job import Cadence, TrainingJob
from zeroflow.training.retention import Retention
from zeroflow.training.sampling import SamplingConfig
from zeroflow.training.schedule import Schedule
from zeroflow.training.workload import Workload

Result = TypeVar("Result", bound=StageResult)

torch.set_num_threads(1)  # more threads slow down such small matrices

SHAPE = Shape(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
)
MODEL = ModelConfig(**SHAPE.model_dump(), vocab_size=256)
QWEN3 = MODEL.replace(qk_norm=True, features_per_head=12)
"""With norms of queries and keys, and heads that are together larger than the hidden size."""

NO_END = -1
"""An end-of-text id that does not occur in rows of random ids."""

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]

WORKLOAD = Workload(
    device="cpu",
    device_name="some CPU",
    model=MODEL,
    seq_len=12,
    micro_batch_rows=2,
    accumulate=1,
    precision="fp32",
    compile=False,
)


class Text(NamedTuple):
    corpus: CorpusConfig
    tokenizer: Tokenizer
    texts: list[str]
    """Texts by number: document d7 is texts[7]."""


def training_config(*, steps: int = 6, peak: float = 1e-2, **changes: Any) -> TrainingConfig:
    """Return settings of a short training; `changes` replace fields of it or of its workload."""
    of_workload = {name: changes.pop(name) for name in Workload.model_fields if name in changes}
    settings: dict[str, Any] = {
        "seed": 0,
        "workload": WORKLOAD.replace(**of_workload),
        "schedule": Schedule(name="cosine", peak=peak, warmup_steps=1, steps=steps),
    }
    return TrainingConfig(**settings | changes)


def with_workload(config: TrainingConfig, **changes: Any) -> TrainingConfig:
    """Return `config` with `changes` of its workload."""
    return config.replace(workload=config.workload.replace(**changes))


def training_job(
    run_dir: Path,
    shards: ShardSet,
    tokenizer: Tokenizer,
    training: TrainingConfig,
) -> TrainingJob:
    """Return a job without tracking in `run_dir`, which is created."""
    run_dir.mkdir(exist_ok=True)
    return TrainingJob(
        run_dir=run_dir,
        training=with_workload(training, seq_len=shards.row_tokens - 1),
        cadence=Cadence(log=1, validate_=10, checkpoint=10),
        retention=Retention(keep=1),
        hang_seconds=3600,
        roll_back_spikes=False,
        shards=shards,
        validation_rows=2,
        tokenizer=tokenizer,
        prompt="",
        sampling=SamplingConfig(),
        tracking=TrackingConfig(
            uri="", folder=None, run_name="run", tags={}, params={}, dataset=None
        ),
        peak_flops=None,
    )


def lively_model(config: ModelConfig = MODEL, *, seed: int = 0) -> Llama:
    """Return a model with ten times larger weights than fresh ones, so that its logits vary."""
    model = Llama(config)
    initialize(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
            elif "self_attn" in name:  # so that norms cannot be exchanged
                slope = 1 if "q_norm" in name else -1
                parameter.add_(slope * torch.linspace(-0.5, 0.5, len(parameter)))
    return model.eval()


class ArrayRows(np.ndarray):
    """An array that replaces `Rows`: `array.view(ArrayRows)`."""

    end_of_text = NO_END

    @property
    def row_tokens(self) -> int:
        return int(self.shape[1])


class RandomBatches:
    """Micro-batches of random ids that depend only on the step, like the real ones."""

    def __init__(self, *, rows: int = 2, tokens: int = 12, accumulate: int = 1) -> None:
        self._shape, self._accumulate = (rows, tokens + 1), accumulate

    def micro_batches(self, step: int) -> list[MicroBatch]:
        generator = torch.Generator().manual_seed(step)
        rows = [
            torch.randint(MODEL.vocab_size, self._shape, generator=generator)
            for _ in range(self._accumulate)
        ]
        return [to_micro_batch(row.numpy(), end_of_text=NO_END) for row in rows]


def jsonl_corpus(file: Path, texts: list[str]) -> CorpusConfig:
    """Return a resolved corpus: one .jsonl file with `texts` as documents d0, d1, ..."""
    lines = (json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(texts))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return files_corpus(str(file))


def files_corpus(*paths: str, **settings: Any) -> CorpusConfig:
    """Return a resolved corpus of files."""
    return resolve_corpus(CorpusConfig(data_mode="files", data_path=paths, **settings)).corpus


def read_files(*paths: Path, **settings: Any) -> list[Document]:
    """Return the documents of files."""
    return list(read_documents(files_corpus(*map(str, paths), **settings)))


def as_jsonl(rows: list[dict[str, str]]) -> bytes:
    """Return the content of a .jsonl file with these rows."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def synthetic_rows(cache: Path) -> tuple[ShardSet, Tokenizer]:
    """Return a few rows of synthetic data and their tokenizer."""
    shutil.copytree(_built_synthetic_rows().name, cache, dirs_exist_ok=True)
    return _synthetic_rows(cache)


@lru_cache(maxsize=1)
def _built_synthetic_rows() -> TemporaryDirectory[str]:
    """A cache folder with the rows, which are built once for all tests of a process."""
    folder = TemporaryDirectory()
    _synthetic_rows(Path(folder.name))
    return folder


def _synthetic_rows(cache: Path) -> tuple[ShardSet, Tokenizer]:
    corpus = CorpusConfig(data_mode="synthetic")
    config = TokenizerConfig(tokenizer_name="synthetic", vocab_size=300)
    tokenizer = fetch_tokenizer(config, corpus, cache)
    few = ShardConfig(seq_len=32, train_rows=4, validation_rows=1)
    return build_shards(few, corpus, tokenizer, cache), tokenizer


def apart_from_reuse(result: Result) -> Result:
    """Return the result without the fields that depend on reuse."""
    return result.replace(reused=False, why="")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file below `folder`, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

"""Files of a run before format 2, reduced to the parts that are read; paths are relative."""

from typing import Any

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
}

DEVICE_NAME = "x86_64 CPU, 2 threads"

JOB: dict[str, Any] = {
    "run_dir": "runs/done",
    "model": MODEL,
    "training": {
        "seed": 0,
        "micro_batch_rows": 4,
        "accumulate": 2,
        "ranks": 1,
        "zero_stage": 0,
        "document_mask": False,
        "z_loss": 0.0,
        "schedule": {"name": "cosine", "peak": 0.001, "warmup_steps": 6, "steps": 60},
        "optimizer": {
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-08,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
        },
        "compute": {
            "device": "cpu",
            "precision": "fp32",
            "fp8": False,
            "compile": False,
            "deterministic": False,
            "activation_checkpointing": "none",
        },
    },
    "cadence": {"log": 5, "validate_": 30, "checkpoint": 12},
    "retention": {"keep": 2, "keep_every": None},
    "hang_seconds": 3600,
    "roll_back_spikes": False,
    "skips": [],
    "shards": {
        "path": "shards/sample-64-b015d189a56f",
        "parts": 1,
        "row_tokens": 65,
        "end_of_text": 0,
        "train": {
            "rows": 184424,
            "documents": 1723,
            "document_tokens": 11986625,
            "padding_tokens": 935,
            "cut_documents": 1614,
            "text_bytes": 31053282,
        },
        "validation": {
            "rows": 2801,
            "documents": 35,
            "document_tokens": 181944,
            "padding_tokens": 121,
            "cut_documents": 32,
            "text_bytes": 458797,
        },
        "empty_documents": 28,
        "duplicates": 0,
        "bad_lines": 0,
        "entropy": None,
    },
    "validation_rows": 128,
    "tokenizer": {
        "name": "train",
        "path": "tokenizers/bpe-1024-sample-815ff6a1ab38",
        "vocab_size": 1024,
        "end_of_text": 0,
        "fingerprint": "79f16cb74e72",
        "encoder": "fastokens",
    },
    "prompt": "def ",
    "sampling": {"tokens": 48, "temperature": 0.8, "top_k": 50, "seed": 0},
    "tracking": {
        "uri": "sqlite:///mlflow/mlflow.db",
        "folder": "mlflow",
        "run_name": "done",
        "tags": {"device": DEVICE_NAME, "gpus": "1"},
        "params": {"seed": "0"},
        "dataset": {
            "name": "sample",
            "digest": "b015d189a56f",
            "source": "sample@85a67cfcbd6a3d72",
        },
    },
    "compile_cache": "compile",
    "peak_flops": None,
}

PREFLIGHT, OVERFIT = "730929f9df0a", "5bd6400e10d9"
"""Fingerprints of the checks of `JOB`, the first one with PyTorch `TORCH`."""

TORCH = "2.13.0+cpu"

WORKLOAD = {
    "device": DEVICE_NAME,
    "gpus": 1,
    "zero_stage": 0,
    "model": MODEL,
    "seq_len": 64,
    "micro_batch_rows": 4,
    "accumulate": 2,
    "precision": "fp32",
    "fp8": False,
    "compile": False,
    "deterministic": False,
    "document_mask": False,
    "activation_checkpointing": "none",
}
"""The workload of `JOB` in its plan.json and in plans.jsonl."""

PAST = {
    "run": "done",
    "steps": 60,
    "workload": WORKLOAD,
    "predicted": {
        "tokens_per_second": 151655.10589360358,
        "seconds": 0.20256489103342276,
        "memory_bytes": 492487014,
        "shard_bytes": 31525224,
        "checkpoint_bytes": 1675008,
    },
    "measured": {
        "tokens_per_second": 28430.212804924948,
        "seconds": 1.062531617588423,
        "memory_bytes": 480882688,
        "shard_bytes": 48680984,
        "checkpoint_bytes": 1829754,
    },
}
"""The line of `JOB` in plans.jsonl."""

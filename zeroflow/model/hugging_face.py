"""The model's configuration in the format of Hugging Face's config.json, and the model itself."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import JsonValue

from zeroflow.model.llama import Llama, ModelConfig


def config_json(shape: ModelConfig, *, context: int, end_of_text: int) -> dict[str, JsonValue]:
    """Return the settings of a model in Hugging Face's format.

    They are those of `LlamaConfig`, or of `Qwen3Config` for a model with norms of queries and keys.

    Args:
        context: context length in training, in tokens.
        end_of_text: id that ends documents. In training every document follows one, so the id is
            also used as the beginning of a text.
    """
    settings: dict[str, JsonValue] = {
        "architectures": ["Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if shape.qk_norm else "llama",
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "max_position_embeddings": context,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    if shape.qk_norm or shape.features_per_head:
        settings["head_dim"] = shape.head_dim  # Qwen3Config has a fixed default
    return settings


def as_hugging_face(model: Llama, *, context: int, end_of_text: int) -> Any:
    """Return `model` as a model of transformers that shares its weights.

    Args:
        context, end_of_text: as for `config_json`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = config_json(model.config, context=context, end_of_text=end_of_text)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):  # without weights of its own
        network = AutoModelForCausalLM.from_config(config)
    angles = type(network.model.rotary_emb)
    network.model.rotary_emb = angles(config)  # its buffers are computed, not loaded
    weights = dict(model.state_dict())
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a model, from the content of its config.json.

    Raises:
        ValueError: this decoder cannot express the model; the message names every difference.
    """
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if missing := [name for name in (*needed, "vocab_size") if name not in settings]:
        raise ValueError(f"config.json has no {', no '.join(missing)}")
    if different := list(_differences(settings)):
        raise ValueError(f"this decoder has no {', no '.join(different)}")
    rope = settings.get("rope_parameters") or {}
    heads, is_qwen3 = settings["num_attention_heads"], settings["model_type"] == "qwen3"
    features = settings.get("head_dim") or (_QWEN3_HEAD_DIM if is_qwen3 else None)
    return ModelConfig(
        hidden_size=settings["hidden_size"],
        num_hidden_layers=settings["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=settings.get("num_key_value_heads") or heads,
        intermediate_size=settings["intermediate_size"],
        vocab_size=settings["vocab_size"],
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10_000.0)),
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        features_per_head=None if features == settings["hidden_size"] // heads else features,
        qk_norm=is_qwen3,
    )


_QWEN3_HEAD_DIM = 128
"""Default of `Qwen3Config`."""


def _differences(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the features of a model that this decoder lacks, as named in config.json.

    A value that is missing there has the default of `LlamaConfig` or `Qwen3Config`.
    """
    if (kind := settings.get("model_type")) not in ("llama", "qwen3"):
        yield f"model_type {kind}, only llama and qwen3"
        return  # the other names may have another meaning
    if (activation := settings.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act {activation}"
    for bias in ("attention_bias", "mlp_bias"):
        if settings.get(bias):
            yield f"biases ({bias})"
    if settings.get("use_sliding_window"):
        yield "sliding windows (use_sliding_window)"
    for rope in ("rope_parameters", "rope_scaling"):
        given = settings.get(rope) or {}
        if (kind := given.get("rope_type", given.get("type", "default"))) != "default":
            yield f"{rope} of type {kind}"
    if settings.get("quantization_config"):
        yield "quantized weights (quantization_config)"

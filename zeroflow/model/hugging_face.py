"""The model's configuration in the format of Hugging Face's config.json."""

from pydantic import JsonValue

from zeroflow.model.llama import ModelConfig


def llama_config(shape: ModelConfig, *, context: int, end_of_text: int) -> dict[str, JsonValue]:
    """Return the settings of `LlamaConfig` for a model.

    Args:
        context: context length in training, in tokens.
        end_of_text: id that ends documents. In training every document follows one, so the id is
            also used as the beginning of a text.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }

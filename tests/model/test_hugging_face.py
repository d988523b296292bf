import pytest
from tiny import MODEL, QWEN3

from zeroflow.model.hugging_face import config_json, model_config

CONFIG = config_json(MODEL, context=64, end_of_text=0)


def test_own_configuration_is_read_as_it_was_written():
    assert model_config(CONFIG) == MODEL


def test_head_of_its_own_is_read_and_written():
    untied = MODEL.replace(tie_word_embeddings=False)
    config = config_json(untied, context=64, end_of_text=0)
    assert config["tie_word_embeddings"] is False and model_config(config) == untied
    del config["tie_word_embeddings"]  # the default of transformers
    assert model_config(config) == untied


def test_norms_of_queries_and_keys_are_read_and_written_as_qwen3():
    config = config_json(QWEN3, context=64, end_of_text=0)
    assert (config["model_type"], config["head_dim"]) == ("qwen3", 12)
    assert model_config(config) == QWEN3
    del config["head_dim"]  # the default of transformers
    assert model_config(config).head_dim == 128
    usual = QWEN3.replace(features_per_head=None)
    assert model_config(config_json(usual, context=64, end_of_text=0)) == usual


def test_heads_of_another_size_are_read_and_written():
    config = CONFIG | {"head_dim": 16}
    read = model_config(config)
    assert (read.head_dim, read.query_size, read.qkv_size) == (16, 64, 128)
    assert config_json(read, context=64, end_of_text=0) == config


def test_configuration_of_earlier_versions_of_transformers_is_read():
    older = {name: value for name, value in CONFIG.items() if name != "rope_parameters"}
    del older["num_key_value_heads"]
    read = model_config(older | {"rope_theta": 7.0, "rope_scaling": None, "head_dim": 8})
    assert read == MODEL.replace(rope_theta=7.0, num_key_value_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "this decoder has no model_type gpt2, only llama and qwen3"),
        ({"hidden_act": "gelu"}, "no hidden_act gelu"),
        ({"attention_bias": True, "mlp_bias": True}, "biases .attention_bias.*mlp_bias"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "no sliding windows"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, "rope_scaling of type llama3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "no rope_parameters of type yarn"),
        ({"quantization_config": {"bits": 4}}, "no quantized weights"),
    ],
)
def test_model_that_the_decoder_cannot_express_is_refused_by_every_difference(change, message):
    with pytest.raises(ValueError, match=message):
        model_config(CONFIG | change)


def test_configuration_without_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"config.json has no hidden_size, no num_hidden_layers"):
        model_config({"model_type": "llama"})

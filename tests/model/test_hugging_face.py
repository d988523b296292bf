import pytest
from tiny import MODEL

from zeroflow.model.hugging_face import llama_config, model_config

CONFIG = llama_config(MODEL, context=64, end_of_text=0)


def test_own_configuration_is_read_as_it_was_written():
    assert model_config(CONFIG) == MODEL


def test_head_of_its_own_is_read_and_written():
    untied = MODEL.replace(tie_word_embeddings=False)
    config = llama_config(untied, context=64, end_of_text=0)
    assert config["tie_word_embeddings"] is False and model_config(config) == untied
    del config["tie_word_embeddings"]  # the default of transformers
    assert model_config(config) == untied


def test_configuration_of_earlier_versions_of_transformers_is_read():
    older = {name: value for name, value in CONFIG.items() if name != "rope_parameters"}
    del older["num_key_value_heads"]
    read = model_config(older | {"rope_theta": 7.0, "rope_scaling": None, "head_dim": 8})
    assert read == MODEL.replace(rope_theta=7.0, num_key_value_heads=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "this decoder has no model_type gpt2, only llama"),
        ({"hidden_act": "gelu"}, "no hidden_act gelu"),
        ({"attention_bias": True, "mlp_bias": True}, "biases .attention_bias.*mlp_bias"),
        ({"head_dim": 16}, "no head_dim 16 other than hidden_size / num_attention_heads"),
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

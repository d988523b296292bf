from tiny import SHAPE

from zeroflow import artifacts
from zeroflow.model.build import build_model
from zeroflow.model.llama import Llama, ModelConfig
from zeroflow.model.sizes import with_vocabulary
from zeroflow.run_folder import RunFolder


def test_network_can_be_rebuilt_from_the_description_on_disk(tmp_path):
    config = build_model(with_vocabulary(SHAPE, 300), RunFolder(tmp_path))
    facts = artifacts.read_json(tmp_path / "model.json")
    network = Llama(ModelConfig(**{n: facts[n] for n in ModelConfig.model_fields.keys() & facts}))
    assert network.config == config
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["embedding_parameters"] == network.model.embed_tokens.weight.numel() == 384 * 32

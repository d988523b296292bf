"""From a shape and a vocabulary to the network's full description."""

import logging
from pathlib import Path

import torch

from zeroflow import artifacts
from zeroflow.model.llama import Llama, ModelConfig, Shape
from zeroflow.model.sizes import with_vocabulary

log = logging.getLogger(__name__)

MODEL_FILE = "model.json"


def build(shape: Shape, vocab_size: int, folder: Path) -> ModelConfig:
    """The network for a tokenizer of `vocab_size` tokens, recorded in `folder/model.json`.

    It is built without memory for its weights, so that a wrong shape fails here; the training
    process makes the weights, from the seed.
    """
    config = with_vocabulary(shape, vocab_size)
    with torch.device("meta"):
        network = Llama(config)
    built = sum(parameter.numel() for parameter in network.parameters())
    assert built == config.parameters, f"closed form {config.parameters}, built {built}"
    facts = {
        **config.model_dump(),
        "parameters": config.parameters,
        "embedding_parameters": config.embedding_parameters,
    }
    artifacts.write_json(folder / MODEL_FILE, facts)
    log.info(
        "model: %s parameters, %s of them in the embedding of %d tokens",
        f"{config.parameters:,}",
        f"{config.embedding_parameters:,}",
        config.vocab_size,
    )
    return config

"""The configuration of the network, from its shape and the vocabulary."""

import logging

from zeroflow import artifacts
from zeroflow.model.llama import ModelConfig, Shape
from zeroflow.model.sizes import with_vocabulary
from zeroflow.run_folder import RunFolder

log = logging.getLogger(__name__)


def build_model(shape: Shape, vocab_size: int, folder: RunFolder) -> ModelConfig:
    """Return the configuration for a tokenizer of `vocab_size` tokens, and write it to model.json.

    No weights are created here: each training process initialises them from the seed.
    """
    config = with_vocabulary(shape, vocab_size)
    facts = {
        **config.model_dump(),
        "parameters": config.parameters,
        "embedding_parameters": config.embedding_parameters,
    }
    artifacts.write_json(folder.model, facts)
    log.info(
        "model: %s parameters, %s of them in the embedding of %s tokens",
        f"{config.parameters:,}",
        f"{config.embedding_parameters:,}",
        f"{config.vocab_size:,}",
    )
    return config

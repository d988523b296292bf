"""The file with the configuration of the network."""

import logging

from zeroflow import artifacts
from zeroflow.model.llama import ModelConfig
from zeroflow.run_folder import RunFolder

log = logging.getLogger(__name__)


def build_model(config: ModelConfig, folder: RunFolder) -> ModelConfig:
    """Write the configuration of the network to model.json, and return it.

    No weights are created here: each training process initialises or reads them.
    """
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

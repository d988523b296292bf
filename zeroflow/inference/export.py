"""Export a checkpoint to a folder that plain transformers opens."""

import logging
import shutil
from pathlib import Path

from zeroflow import artifacts
from zeroflow.data.tokenizer import Tokenizer
from zeroflow.model.hugging_face import llama_config
from zeroflow.model.llama import Llama

log = logging.getLogger(__name__)


def export(model: Llama, tokenizer: Tokenizer, folder: Path, *, context: int) -> None:
    """Write `model` as LlamaForCausalLM with its tokenizer into a new `folder`.

    Args:
        context: context length in training, in tokens.

    Raises:
        ValueError: `folder` exists and is not empty.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a new folder for --out")
    config = LlamaConfig.from_dict(
        llama_config(model.config, context=context, end_of_text=tokenizer.end_of_text)
    )
    network = LlamaForCausalLM(config)
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    network.load_state_dict(weights, strict=True)
    network.generation_config = GenerationConfig(
        bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text
    )
    network.save_pretrained(folder)
    if tokenizer.path is not None:
        for file in tokenizer.path.iterdir():
            if file.name not in (artifacts.MANIFEST, "config.json"):
                shutil.copyfile(file, folder / file.name)
    log.info("exported to %s", folder)

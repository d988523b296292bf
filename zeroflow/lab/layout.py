"""The groups of parameters that FSDP2 gathers and reduces together, and their padded sizes."""

from typing import NamedTuple

import torch

from zeroflow.model.llama import Llama, ModelConfig


class ParameterGroup(NamedTuple):
    """Parameters that one collective carries: those of a block, or the others."""

    shapes: tuple[torch.Size, ...]

    def padded(self, shards: int) -> int:
        """Return the number of values, with the rows that pad every parameter to equal shards."""
        return sum(_padded(shape, shards) for shape in self.shapes)

    @property
    def parameters(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


def _padded(shape: torch.Size, shards: int) -> int:
    rows = -(-shape[0] // shards) * shards
    return rows * (shape.numel() // shape[0])


def groups(model: ModelConfig) -> list[ParameterGroup]:
    """Return the groups that `zero.shard` makes: the root with embedding and last norm, and the
    blocks."""
    with torch.device("meta"):  # shapes only, and all blocks have the same
        llama = Llama(model.replace(num_hidden_layers=1))
    [block] = llama.model.layers
    inner = {id(p) for p in block.parameters()}
    rest = tuple(p.shape for p in llama.parameters() if id(p) not in inner)
    blocks = [ParameterGroup(tuple(p.shape for p in block.parameters()))] * model.num_hidden_layers
    return [ParameterGroup(rest), *blocks]

"""Tensors that exist in a training step, by part, recorded as PyTorch allocates and frees them."""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zeroflow.lab.collectives import is_wrapped
from zeroflow.model.llama import ModelConfig
from zeroflow.training import zero
from zeroflow.training.state import TrainState

Part = Literal["parameters", "moments", "gradients", "gathered", "logits", "buffers", "activations"]
"""Parts of the memory of a rank.

parameters: this rank's shard of the weights, fp32. moments: state of the optimiser.
gradients: whole ones of a rank, until they are reduced, and its shard of the sums.
gathered: whole weights, in use. logits: a chunk of them in the loss.
buffers: copies of weights and gradients that collectives read or write.
activations: everything else that the forward and backward pass compute.
"""

PARTS: tuple[Part, ...] = get_args(Part)

HOST_PARTS: tuple[Part, ...] = ("parameters", "gradients", "moments")
"""Parts that are in host memory if the state of the optimiser is offloaded. On the GPU, there are
then only gradients that have not been reduced."""

_MAKE_GRADIENTS = {
    "aten::mm",
    "aten::empty_like",
    "aten::embedding_dense_backward",
    "aten::add.Tensor",
    "aten::_to_copy",
}
"""Operators whose results are gradients if they have the shape of a matrix of weights."""


class TensorRecorder(TorchDispatchMode):
    """Records the storages that exist in its block, and their parts.

    A temporary inside a kernel is not seen. A storage is assigned to a part when it is used, such
    as by a collective, so the bytes are added up after the block.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self._vocabulary = state.model.config.vocab_size
        self._matrices = _matrices(state.model.config)
        self._changes: list[tuple[int, int]] = []
        """Number of a storage, and the bytes by which it grew."""

        self._parts: dict[int, Part] = {}
        self._numbers: dict[int, int] = {}
        """Number of each storage that exists, by its address."""

        self._sizes: dict[int, int] = {}
        self._on_host: set[int] = set()
        """Numbers of the storages in host memory, if state is offloaded."""

        device = zero.device_of(state.model).type
        weights = (zero.local_shard(p) for _, p in zero.named_parameters(state.model))
        self._offloaded = any(weight.device.type != device for weight in weights)
        for _, parameter in zero.named_parameters(state.model):
            self._assign([zero.local_shard(parameter.detach())], "parameters")
            moments = state.optimizer.state[parameter].values()
            self._assign(map(zero.local_shard, moments), "moments")

    def __enter__(self) -> Self:
        self._resize: Any = UntypedStorage.resize_
        recorder = self

        def resize(storage: UntypedStorage, size: int) -> Any:
            result = recorder._resize(storage, size)
            recorder._update(storage)
            return result

        # FSDP2 frees and allocates gathered weights by resizing their storages, not by operators
        UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, traceback)

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        if is_wrapped(types):
            return NotImplemented
        result = function(*arguments, **options or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if function.name() == "aten::split.Tensor" and self._is_new(tensors[0]):
            return result  # a temporary inside Gloo, which is seen when Gloo copies from it
        if function.name() == "aten::copy_" and self._is_new(tensors[0]):
            # Only copies of weights have storages from before the block, which FSDP2 resized
            self._assign(tensors, "gathered")
        for tensor in tensors:
            self._see(tensor)
        self._assign_parts(function.name(), arguments, options or {}, tensors)
        if self._offloaded and function.name() == "aten::_to_copy":
            self._assign_copy(arguments[0], *tensors)
        return result

    def _assign_copy(self, source: Tensor, copy: Tensor) -> None:
        """Assign copies between host and device: those of gradients to the host, and of weights."""
        if source.device.type != "cpu" and copy.device.type == "cpu":
            self._assign([copy], "gradients")
        elif self._parts.get(self._see(source)) == "parameters":
            self._assign([copy], "buffers")

    def _assign_parts(
        self, name: str, arguments: tuple[Any, ...], options: dict[str, Any], results: list[Tensor]
    ) -> None:
        match name:
            case "fsdp::all_gather_copy_in":
                self._assign(arguments[0], "buffers")
                self._assign([arguments[1]], "buffers")
            case "fsdp::split_with_sizes_copy":
                self._assign(options["out"], "gathered")
            case "fsdp::chunk_cat":
                self._assign(arguments[0], "gradients")
                self._assign([options["out"]], "buffers")
            case "c10d::_reduce_scatter_base_":
                self._assign([arguments[0]], "gradients")
            case "c10d::allreduce_":
                self._assign(arguments[0], "gradients")
            case "aten::new_empty" | "aten::_to_copy":
                self._assign(filter(self._are_logits, results), "logits")
        # A product for the gradient of a matrix begins with a transposed factor
        is_forward = name == "aten::mm" and arguments[0].is_contiguous()
        if name in _MAKE_GRADIENTS and not is_forward:
            self._assign([t for t in results if t.shape in self._matrices], "gradients")

    def _assign(self, tensors: Iterable[Tensor], part: Part) -> None:
        for tensor in tensors:
            # The first use decides: the shards of fp32 weights are also the input of their gather
            self._parts.setdefault(self._see(tensor), part)

    def _are_logits(self, tensor: Tensor) -> bool:
        return self._vocabulary in tensor.shape and tensor.shape not in self._matrices

    def _is_new(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self._numbers

    def _see(self, tensor: Tensor) -> int:
        """Return the number of the tensor's storage, which may be new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            self._numbers[address] = len(self._sizes)
            self._sizes[self._numbers[address]] = 0
            if self._offloaded and storage.device.type == "cpu":
                self._on_host.add(self._numbers[address])
            weakref.finalize(storage, self._free, address)
            self._update(storage)
        return self._numbers[address]

    def _update(self, storage: UntypedStorage) -> None:
        if (number := self._numbers.get(storage._cdata)) is not None:
            self._set_size(number, storage.nbytes())

    def _free(self, address: int) -> None:
        self._set_size(self._numbers.pop(address), 0)

    def _set_size(self, number: int, size: int) -> None:
        self._changes.append((number, size - self._sizes[number]))
        self._sizes[number] = size

    def peaks(self) -> dict[str, int]:
        """Return the largest number of bytes of each part, and of all parts together ("peak").

        Storages in host memory are left out if state is offloaded.
        """
        return self._largest(on_host=False)

    def host_peaks(self) -> dict[str, int]:
        """Return the largest number of bytes of each of `HOST_PARTS` in host memory; empty if no
        state is offloaded."""
        if not self._offloaded:
            return {}
        found = self._largest(on_host=True)
        return {part: found[part] for part in HOST_PARTS}

    def _largest(self, *, on_host: bool) -> dict[str, int]:
        now: Counter[str] = Counter()
        most: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        for number, growth in self._changes:
            if (number in self._on_host) != on_host:
                continue
            for name in (self._parts.get(number, "activations"), "peak"):
                now[name] += growth
                most[name] = max(most[name], now[name])
        return dict(most)


def _matrices(model: ModelConfig) -> set[torch.Size]:
    """Return the shapes of the matrices whose gradients a product computes.

    Matrices with the same input are multiplied together, see `llama.linear`.
    """
    D, M = model.hidden_size, model.intermediate_size
    heads = model.num_attention_heads * model.head_dim
    shapes = [(model.vocab_size, D), (model.qkv_size, D), (D, heads), (2 * M, D), (D, M)]
    return set(map(torch.Size, shapes))

"""Chooses the fastest of several kernels by measuring them for the shapes of the run.

Which kernel is the fastest depends on the GPU, the shapes and the versions. The candidates are
timed when a run first needs them on a machine. The choice is stored in the cache, so that all later
processes of the run use the same kernels: another kernel would change the last bits of the result.
"""

import importlib.metadata
import importlib.util
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zeroflow import artifacts
from zeroflow.config import Config
from zeroflow.device import Device
from zeroflow.model import hopper
from zeroflow.model.attention import AttentionKernel, attend
from zeroflow.model.llama import FusedFeedForward, linear, swiglu
from zeroflow.records import Record
from zeroflow.training.loss import LossKernel, cross_entropy_sum
from zeroflow.training.workload import Workload

log = logging.getLogger(__name__)

EXTRA = "zeroflow[hopper]"
"""The requirement that installs `_PACKAGES`."""

_PACKAGES = ("flash-attn-4", "quack-kernels")
_MODULES = ("flash_attn.cute", "quack")
_HOPPER = (9, 0)
"""Compute capability of Hopper, the only one that all of the kernels support."""

_ROUNDS, _WARM_UP = 10, 3
"""Number of timed calls of each candidate, and of calls before them."""

_MAX_LOSS_TOKENS = 32_768
"""Maximum number of tokens in the timing of the loss. It works in chunks, so more tokens take
proportionally longer with every kernel."""

_CANDIDATES = 4
"""Version of the candidates and of their comparison, so that an older choice is made again."""

_GAIN = 1.01
"""Minimum speed-up over the default kernel; smaller differences are noise."""

_DIFFERENCE = 0.25
"""Maximum difference of a result from that of the default kernel, relative to its norm. Rounding to
8 bits explains about half of it, and a kernel that computes something else exceeds it."""

FeedForwardKernel = Literal["separate", "fused"]
"""SwiGLU in separate passes over memory, or as in `Workload.fused_feed_forward`."""


class Kernels(Config):
    """Kernels of a training step; the defaults need no package besides PyTorch."""

    attention: AttentionKernel = "cudnn"
    feed_forward: FeedForwardKernel = "separate"
    loss: LossKernel = "chunks"


class KernelChoice(Record):
    """The fastest kernels for the shapes of a run, stored in a file of the cache."""

    kernels: Kernels
    milliseconds: dict[str, dict[str, float | None]]
    """Time of forward and backward pass for each part of the model and each kernel. None if the
    kernel failed, or if its results were wrong."""


class Contest(NamedTuple):
    """Kernels that compute the same part of the model; the first is the default."""

    part: str
    candidates: dict[str, Callable[[], Tensor]]
    """Each returns a tensor to differentiate."""

    inputs: tuple[Tensor, ...]


def choose(work: Workload, folder: Path, *, z_loss: float) -> Kernels:
    """Return the fastest kernels for the shapes of `work` on this GPU.

    If `work` is deterministic, so are the kernels. On a CPU and in fp32, the defaults are returned.
    The first call for a shape measures for about 20 s and writes the result to `folder`; later
    calls read it.
    """
    if work.device != "cuda" or work.precision == "fp32":
        return Kernels()
    on_hopper = torch.cuda.get_device_capability() == _HOPPER
    extra = on_hopper and has_extra()
    if on_hopper and not extra:
        log.info("faster kernels for this GPU: pip install '%s'", EXTRA)
    path = folder / f"kernels-{artifacts.fingerprint(_identity(work, extra, z_loss))}.json"
    if not path.exists():
        measured = measure(_contests(work, extra=extra, z_loss=z_loss))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        folder.mkdir(parents=True, exist_ok=True)
        measured.write(path)
    choice = KernelChoice.read(path)
    log.info("kernels: %s", "; ".join(f"{part}: {_text(ms)}" for part, ms in _parts(choice)))
    return choice.kernels


def determinism_is_free(work: Workload, device: Device) -> bool:
    """Return True if the deterministic kernels are about as fast as the others on `device`.

    This was measured with FlashAttention-4, and not with 8-bit products.
    """
    in_use = work.model.head_dim in hopper.HEAD_DIMS and work.attends_to_rows
    plain = work.linear is linear
    return in_use and plain and device.capability == _HOPPER and has_extra()


def has_extra() -> bool:
    """Return True if the packages of `EXTRA` are installed."""
    return all(_is_installed(module) for module in _MODULES)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that contains the module is missing
        return False


def _identity(work: Workload, extra: bool, z_loss: float) -> list[Any]:
    """Return everything that the times depend on, except the machine: the cache belongs to it."""
    versions = [importlib.metadata.version(name) for name in _PACKAGES] if extra else []
    return [
        *(torch.cuda.get_device_name(), torch.__version__, *versions),
        *(work.model.model_dump(), work.micro_batch_rows, work.seq_len),
        *(work.arithmetic, work.compile, work.deterministic, work.attends_to_rows, z_loss > 0),
        _CANDIDATES,
    ]


def measure(contests: Iterable[Contest]) -> KernelChoice:
    """Time all candidates and choose the fastest of each contest."""
    started = time.monotonic()
    times: dict[str, dict[str, float | None]] = {}
    for contest in contests:
        times[contest.part] = _times(contest)
    log.info("the kernels were measured in %.1f s", time.monotonic() - started)
    chosen = {part: fastest(measured) for part, measured in times.items()}
    return KernelChoice(kernels=Kernels.model_validate(chosen), milliseconds=times)


def fastest(milliseconds: dict[str, float | None]) -> str:
    """Return the fastest kernel. It is the first, the default, unless another is clearly faster."""
    default, *others = milliseconds
    known = {name: ms for name in others if (ms := milliseconds[name]) is not None}
    best = min(known, key=known.__getitem__, default=default)
    time_of_default = milliseconds[default]
    if best == default or (time_of_default is not None and known[best] * _GAIN > time_of_default):
        return default
    return best


def _times(contest: Contest) -> dict[str, float | None]:
    """Return the median time of each candidate in milliseconds; None if the kernel cannot be used.

    A kernel can be used if it does not fail, and if its results are those of the default kernel up
    to rounding. The candidates take turns, so that changes of the GPU's clock rate affect all of
    them equally.
    """
    samples: dict[str, list[float]] = {}
    expected: list[Tensor] = []
    for name, run in contest.candidates.items():
        try:
            results = _results(run, contest.inputs)
            expected = expected or results
            if (difference := largest_difference(results, expected)) > _DIFFERENCE:
                raise ValueError(f"its results differ from the default's by {difference:.2g}")
            del results
            for _ in range(_WARM_UP):
                _milliseconds(run, contest.inputs)
            samples[name] = []
        except Exception as error:
            if name == next(iter(contest.candidates)):
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            log.warning("the kernel %s of %s cannot be used: %s", name, contest.part, reason)
    del expected
    for _ in range(_ROUNDS):
        for name, taken in samples.items():
            taken.append(_milliseconds(contest.candidates[name], contest.inputs))
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    return {name: medians.get(name) for name in contest.candidates}


def _results(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the result of a kernel, and its gradients for a random gradient of the result."""
    y = run()
    generator = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, device=y.device, dtype=torch.float32, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def largest_difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of a result from the expected one, relative to its norm."""
    differences = [
        ((mine.float() - theirs.float()).norm() / theirs.float().norm()).nan_to_num(nan=math.inf)
        for mine, theirs in zip(results, expected, strict=True)
    ]
    return torch.stack(differences).max().item()


def _milliseconds(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    y = run()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _contests(work: Workload, *, extra: bool, z_loss: float) -> Iterator[Contest]:
    """Yield a contest for each part of the model for which `work` leaves a choice.

    They are yielded one by one, so that only the tensors of one are in memory.
    """
    if work.attends_to_rows:
        yield _attention(work, extra=extra)
    if work.can_fuse_feed_forward or (extra and work.linear is linear):
        yield _feed_forward(work)
    if len(candidates := _loss_kernels(work, extra=extra, z_loss=z_loss)) > 1:
        yield _loss(work, candidates, z_loss)


def _attention(work: Workload, *, extra: bool) -> Contest:
    model = work.model
    H, K, E = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    joined = _random(work, work.micro_batch_rows, work.seq_len, H + 2 * K, E)
    kernels: list[AttentionKernel] = ["flash"] if work.deterministic else ["cudnn", "flash"]
    if extra and E in hopper.HEAD_DIMS:
        kernels.append("flash4")

    def run(kernel: AttentionKernel) -> Tensor:
        q, k, v = joined.transpose(1, 2).split((H, K, K), dim=1)
        return attend(q, k, v, kernel=kernel)

    return Contest("attention", {name: partial(run, name) for name in kernels}, (joined,))


def _feed_forward(work: Workload) -> Contest:
    D, M = work.model.hidden_size, work.model.intermediate_size
    x = _random(work, work.micro_batch_rows, work.seq_len, D)
    weights = [_random(work, *shape, dtype=torch.float32) for shape in ((M, D), (M, D), (D, M))]

    def run(function: FusedFeedForward) -> Callable[[], Tensor]:
        compiled = torch.compile(function, dynamic=False) if work.compile else function
        return lambda: compiled(x, *weights)

    separate = partial(swiglu, product=work.linear)
    candidates = {"separate": run(separate), "fused": run(work.fused_feed_forward)}
    return Contest("feed_forward", candidates, (x, *weights))


def _loss_kernels(work: Workload, *, extra: bool, z_loss: float) -> list[LossKernel]:
    model = work.model
    found: list[LossKernel] = ["chunks"]
    if extra and not z_loss and hopper.supports_loss(model.vocab_size, model.hidden_size):
        found += ["one_read", "scaled_exp"]
    if work.can_round_loss:
        found += ["rounded"]
    return found


def _loss(work: Workload, kernels: Sequence[LossKernel], z_loss: float) -> Contest:
    tokens = min(_MAX_LOSS_TOKENS, work.micro_batch_rows * work.seq_len)
    hidden = _random(work, 1, tokens, work.model.hidden_size)
    matrix = _random(work, work.model.vocab_size, work.model.hidden_size, dtype=torch.float32)
    targets = torch.zeros(1, tokens, dtype=torch.int64, device=work.device)
    loss = partial(cross_entropy_sum, hidden, matrix, targets, z_loss)
    return Contest("loss", {name: partial(loss, name) for name in kernels}, (hidden, matrix))


def _random(work: Workload, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # A separate generator leaves PyTorch's random state, which a checkpoint contains, unchanged
    generator = torch.Generator(work.device).manual_seed(0)
    made = torch.randn(*shape, device=work.device, dtype=dtype, generator=generator)
    return made.mul_(0.02).requires_grad_()


def _parts(choice: KernelChoice) -> list[tuple[str, dict[str, float | None]]]:
    return [(part.replace("_", "-"), measured) for part, measured in choice.milliseconds.items()]


def _text(milliseconds: dict[str, float | None]) -> str:
    chosen = fastest(milliseconds)
    others = [
        f"{name} {'failed' if ms is None else f'{ms:.2f}'}"
        for name, ms in milliseconds.items()
        if name != chosen
    ]
    beside = f" ({', '.join(others)})" if others else ""
    return f"{chosen} {milliseconds[chosen]:.2f} ms{beside}"

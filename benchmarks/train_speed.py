"""Compare trainers by the tokens per second of a training step on one device.

Every contender trains the same shape on the same random tokens, with the same number of rows per
optimiser step, in a separate process. See benchmarks/README.md for the method.
"""

import argparse
import gc
import json
import logging
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from zeroflow.config import Config
from zeroflow.data.batches import MicroBatch, to_micro_batch
from zeroflow.data.tokenizer import TokenizerConfig
from zeroflow.device import Device, find_device
from zeroflow.model.sizes import NOMINAL_VOCABULARY, SIZES, with_vocabulary
from zeroflow.training import kernels
from zeroflow.training.config import TrainingConfig
from zeroflow.training.loop import train_step
from zeroflow.training.rank_program import make_deterministic
from zeroflow.training.schedule import Schedule
from zeroflow.training.state import new_state
from zeroflow.training.workload import Workload

log = logging.getLogger(__name__)

_BATCHES = 4
_GAIN = 1.02
"""Minimum speed-up for which the search doubles the rows again; less is noise."""

_LEARNING_RATE = 1e-4
_NO_END = -1
_DOCUMENT_TOKENS = 1000
"""Mean length of a document; FineWeb-Edu's sample-10BT has some 10 million documents."""

_OURS_IN_FP8 = "ours:fp8=true"
_MATMUL = {"cuda": 8192, "cpu": 2048}
_MATMUL_SECONDS = 1.5

Step = Callable[[list[MicroBatch]], Tensor]
"""One step of the optimiser over micro-batches; returns the mean loss, on the device."""

Figures = dict[str, Any]


class Task(Config):
    """Input of a contender."""

    size: str
    vocab_size: PositiveInt
    workload: Workload
    """Workload with the whole batch in one micro-batch; the benchmark replaces that by `rows`."""

    rows: tuple[PositiveInt, ...]
    """Numbers of rows of a micro-batch to try, in this order. A number that is smaller than the one
    before it is tried only if memory ran out with that one."""

    windows: PositiveInt
    seconds: PositiveFloat
    """Length of a window in seconds."""

    def batches(self, rows: int) -> list[list[MicroBatch]]:
        """A few batches of random tokens in micro-batches of `rows` rows, pinned for a GPU."""
        work = self.workload
        random = np.random.default_rng(0)
        shape = (_BATCHES, work.batch_rows // rows, rows, work.seq_len + 1)
        tokens = random.integers(self.vocab_size, size=shape, dtype=np.int32)
        end = _NO_END
        if work.document_mask:  # rows consist of documents of random lengths
            end = self.vocab_size - 1
            tokens[random.random(shape) < 1 / _DOCUMENT_TOKENS] = end
        options = {"document_mask": work.document_mask, "pin": work.device == "cuda"}
        return [
            [to_micro_batch(part, end_of_text=end, **options) for part in batch] for batch in tokens
        ]


# Contenders


def training_config(task: Task, rows: int) -> TrainingConfig:
    """Our training settings for micro-batches of `rows`."""
    return TrainingConfig(
        seed=0,
        workload=task.workload.split(rows),
        schedule=Schedule(name="wsd", peak=_LEARNING_RATE, warmup_steps=0, steps=10**9),
    )


def ours(task: Task, rows: int) -> Step:
    """`new_state` and `train_step` with the fastest kernels, as a run calls them."""
    config = training_config(task, rows)
    if config.workload.deterministic:
        make_deterministic()
    with tempfile.TemporaryDirectory(prefix="zeroflow-kernels-") as folder:
        chosen = kernels.choose(config.workload, Path(folder), z_loss=config.z_loss)
    return _our_step(config.replace(kernels=chosen))


def ours_plain(task: Task, rows: int) -> Step:
    """`ours` with kernels of PyTorch alone."""
    config = training_config(task, rows)
    if config.workload.deterministic:
        make_deterministic()
    return _our_step(config)


def _our_step(config: TrainingConfig) -> Step:
    state = new_state(config)
    return lambda micro_batches: train_step(state, micro_batches, config).loss


def hf_eager(task: Task, rows: int) -> Step:
    """`LlamaForCausalLM` with `sdpa` and its own loss."""
    model = _hugging_face(task)
    return _common_step(task, model, lambda x, y: model(x, labels=y, shift_labels=y).loss)


def hf_compiled(task: Task, rows: int) -> Step:
    """`hf_eager`, compiled as a whole."""
    model = _hugging_face(task)
    compiled = torch.compile(model)  # the loss is inside
    return _common_step(task, model, lambda x, y: compiled(x, labels=y, shift_labels=y).loss)


def liger(task: Task, rows: int) -> Step:
    """`hf_eager` with Liger's defaults: fused head and loss, RMSNorm, rotation, SwiGLU."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return hf_eager(task, rows)


def liger_compiled(task: Task, rows: int) -> Step:
    """`liger`, compiled as a whole."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return hf_compiled(task, rows)


def _hugging_face(task: Task) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = task.workload.model
    config = LlamaConfig(
        **shape.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=task.workload.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with torch.device(task.workload.device):
        return LlamaForCausalLM(config).train()


def torchtitan(task: Task, rows: int) -> Step:
    """Llama 3 of version 0.2, run like its trainer on one GPU: only blocks and loss are compiled.

    Its head is tied here. From version 0.3 on it only has attention masked by document, which is a
    different workload.
    """
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    shape = task.workload.model
    arguments = TransformerModelArgs(
        dim=shape.hidden_size,
        n_layers=shape.num_hidden_layers,
        n_heads=shape.num_attention_heads,
        n_kv_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        # its feed-forward size is 8/3 of dim, rounded up to a multiple of this
        multiple_of=shape.intermediate_size,
        norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        max_seq_len=task.workload.seq_len,
    )
    with torch.device(task.workload.device):
        model = Transformer(arguments)
    model.tok_embeddings.weight = model.output.weight
    for block in model.layers.values():
        block.compile(fullgraph=True)
    loss = torch.compile(cross_entropy_loss)
    return _common_step(task, model, lambda x, y: loss(model(x), y) / y.numel())


def litgpt(task: Task, rows: int) -> Step:
    """As in its pretrain.py: compiled as a whole, with eager cross-entropy in chunks of 128."""
    from litgpt.config import Config as GptConfig
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = task.workload.model
    config = GptConfig(
        block_size=task.workload.seq_len,
        n_layer=shape.num_hidden_layers,
        n_embd=shape.hidden_size,
        n_head=shape.num_attention_heads,
        n_query_groups=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        intermediate_size=shape.intermediate_size,
        norm_class_name="RMSNorm",
        norm_eps=shape.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
        rotary_percentage=1.0,
        rope_base=int(shape.rope_theta),
    )
    with torch.device(task.workload.device):
        model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    compiled = torch.compile(model)
    return _common_step(task, model, lambda x, y: chunked_cross_entropy(compiled(x), y))


def _common_step(
    task: Task, model: nn.Module, mean_loss: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """The step of all peers: autocast, clipping, fused AdamW that decays all parameters."""
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    if count != task.workload.model.parameters:
        raise ValueError(f"{count:,} parameters, but ours has {task.workload.model.parameters:,}")
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(
        parameters, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    bf16 = task.workload.precision == "bf16"

    def step(micro_batches: list[MicroBatch]) -> Tensor:
        losses = []
        for batch in micro_batches:
            inputs, targets = (
                tensor.to(task.workload.device, non_blocking=True)
                for tensor in (batch.inputs, batch.targets)
            )
            with torch.autocast(task.workload.device, torch.bfloat16, enabled=bf16):
                loss = mean_loss(inputs, targets) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()

    return step


class Contender(NamedTuple):
    build: Callable[[Task, int], Step]
    packages: tuple[str, ...]
    """Required packages; the version of the first one is shown."""

    install: str = ""
    """pip requirement."""

    needs_gpu: bool = False


_LIGER = ("liger_kernel", "triton", "transformers")
_TORCHTITAN = ("torchtitan", "tyro", "tensorboard", "triton")
CONTENDERS = {
    "ours": Contender(ours, ("torch",)),
    "ours_plain": Contender(ours_plain, ("torch",)),
    "hf_compiled": Contender(hf_compiled, ("transformers",)),
    "hf_eager": Contender(hf_eager, ("transformers",)),
    "liger": Contender(liger, _LIGER, "liger-kernel", needs_gpu=True),
    "liger_compiled": Contender(liger_compiled, _LIGER, "liger-kernel", needs_gpu=True),
    "torchtitan": Contender(torchtitan, _TORCHTITAN, "'torchtitan>=0.2.2,<0.3'"),
    "litgpt": Contender(litgpt, ("litgpt", "lightning"), "--no-deps litgpt; pip install lightning"),
}


# Measurement, in the contender's process


def measure(contender: str, task: Task) -> Iterator[Figures]:
    """Yield figures for every micro-batch, until memory runs out or the gain is noise."""
    fastest = 0.0
    for rows, following in zip_longest(task.rows, task.rows[1:]):
        try:
            figures = _measure_rows(CONTENDERS[contender].build, task, rows)
        except Exception as error:  # compilers wrap out-of-memory errors in their own
            if "out of memory" not in str(error).lower():
                raise
            figures = {"rows": rows, "failed": "out of memory"}
        yield figures
        out_of_memory = "failed" in figures
        if following is None or (following < rows) != out_of_memory:
            return
        if not out_of_memory and figures["tokens_per_second"] < _GAIN * fastest:
            return
        fastest = max(fastest, figures.get("tokens_per_second", 0.0))
        gc.collect()
        torch.compiler.reset()  # otherwise the next shape is compiled as a dynamic one
        if task.workload.device == "cuda":
            torch.cuda.empty_cache()


def _measure_rows(build: Callable[[Task, int], Step], task: Task, rows: int) -> Figures:
    device = task.workload.device
    batches = task.batches(rows)
    step = build(task, rows)
    wait(device)
    started = time.perf_counter()
    first_loss = float(step(batches[0]))
    first_step = time.perf_counter() - started
    step(batches[1])  # some memory is allocated, and graphs are recorded, only in the second step
    wait(device)

    def seconds_a_step(steps: int) -> float:
        wait(device)
        started = time.perf_counter()
        for number in range(steps):
            step(batches[number % len(batches)])
        wait(device)
        return (time.perf_counter() - started) / steps

    steps = math.ceil(task.seconds / seconds_a_step(1))
    steps = math.ceil(task.seconds / seconds_a_step(steps))  # now the device is warm
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    busy, used = _busy_elsewhere(), time.process_time()
    started = time.perf_counter()
    windows = [seconds_a_step(steps) for _ in range(task.windows)]
    elapsed, busy = time.perf_counter() - started, _busy_elsewhere() - busy
    used = time.process_time() - used
    loss = float(step(batches[0]))
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return {
        "rows": rows,
        "tokens_per_second": task.workload.batch_tokens / statistics.median(windows),
        "windows": windows,
        "steps": steps,
        "busy_elsewhere": max(0.0, busy / elapsed),
        "cpu_seconds_a_step": used / steps / task.windows,
        "first_step_seconds": first_step,
        "peak_gb": peak_bytes(device) / 1e9,
        "losses": [first_loss, loss],
    }


def _busy_elsewhere() -> float:
    """CPU seconds of all other programs on the machine, including time stolen by the hypervisor."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + times.iowait + times.guest + times.guest_nice
    return sum(times) - idle - time.process_time()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Peak memory of tensors on a GPU, or of the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def matmul(task: Task) -> Figures:
    """TFLOP/s of a large matrix product: over ten products, and sustained, when the chip is hot."""
    device, n = task.workload.device, _MATMUL[task.workload.device]
    dtype = torch.bfloat16 if task.workload.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def tflops(products: int) -> float:
        wait(device)
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(a, b)
        wait(device)
        return 2 * n**3 * products / (time.perf_counter() - started) / 1e12

    tflops(3)
    burst = tflops(10)
    many = max(10, round(_MATMUL_SECONDS * burst * 1e12 / (2 * n**3)))
    return {"n": n, "dtype": str(dtype), "burst_tflops": burst, "sustained_tflops": tflops(many)}


def run(contender: str, given: str, file: str) -> None:
    """Entry point of the contender's process; it writes `file` after every trial.

    So the trials before a failure are kept.
    """
    task = Task.model_validate_json(given)
    torch.manual_seed(0)
    trials = []
    for figures in [matmul(task)] if contender == "matmul" else measure(contender, task):
        trials.append(figures)
        Path(file).write_text(json.dumps(trials))


# Comparison


def compare(arguments: argparse.Namespace, device: Device, save: Callable[[Figures], None]) -> None:
    """Measure the requested contenders; if one cannot run, `absent` has the reason.

    Args:
        save: called with the results after each contender, so that an interruption loses only one.
    """
    results = _empty(arguments, device)
    anchor, runs = asked_task(arguments, arguments.sizes[0], {}), results["runs"]
    results["matmul"] += try_in_process("matmul", anchor, arguments.limit)["trials"]
    # Rounds outermost, so that a slow minute does not affect one contender only
    for _, facts in product(range(arguments.rounds), runs):
        if "absent" not in facts and "failed" not in facts:
            _try_once_more(facts, arguments, device)
            log.info("%s, %s: %s", facts["size"], facts["contender"], _outcome(facts))
            save(results)
    results["matmul"] += try_in_process("matmul", anchor, arguments.limit)["trials"]
    save(results)


def _empty(arguments: argparse.Namespace, device: Device) -> Figures:
    """The results before the first measurement."""
    return {
        "device": device.model_dump(),
        "machine": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        "mfu": "(6 N + 6 L D T) FLOPs per token / dense bf16 peak, N with the tied head once",
        "matmul": [],
        "runs": [
            {"size": size, "contender": asked} | _presence(parse_contender(asked)[0], device)
            for size, asked in product(arguments.sizes, arguments.contenders)
        ],
    }


def _try_once_more(facts: Figures, arguments: argparse.Namespace, device: Device) -> None:
    """Measure a contender again: first the search, later more windows with the best rows."""
    name, settings = parse_contender(facts["contender"])
    task = asked_task(arguments, facts["size"], settings)
    best = facts.get("best")
    if best is not None:
        task = task.replace(rows=(best["rows"],))
    outcome = try_in_process(name, task, arguments.limit)
    trials = facts.setdefault("trials", [])
    trials += outcome["trials"]
    done = [trial for trial in outcome["trials"] if "failed" not in trial]
    if "failed" in outcome:
        facts["failed"] = outcome["failed"]
    elif not done:
        facts["failed"] = f"out of memory at {trials[-1]['rows']} rows"
    if not done:
        return
    if best is None:
        facts["best"] = best = dict(max(done, key=lambda trial: trial["tokens_per_second"]))
    else:
        best["windows"] = best["windows"] + done[0]["windows"]
        best["busy_elsewhere"] = max(best["busy_elsewhere"], done[0]["busy_elsewhere"])
        used = min(best["cpu_seconds_a_step"], done[0]["cpu_seconds_a_step"])
        best["cpu_seconds_a_step"] = used
    median = statistics.median(best["windows"])
    best["tokens_per_second"] = task.workload.batch_tokens / median
    best["spread"] = (max(best["windows"]) - min(best["windows"])) / median
    flops = task.workload.flops_per_token * best["tokens_per_second"]
    best["tflops"] = flops / 1e12
    if device.peak_flops and task.workload.precision == "bf16":  # the peak is that of bf16
        best["mfu"] = flops / device.peak_flops


def parse_contender(asked: str) -> tuple[str, dict[str, str]]:
    """Name and settings: `ours:compile=false,document_mask=true`.

    Raises:
        ValueError: there is no such contender, or it has no settings.
    """
    name, _, settings = asked.partition(":")
    if name not in CONTENDERS:
        raise ValueError(f"{name} is not a contender: choose from {', '.join(CONTENDERS)}")
    if settings and not name.startswith("ours"):
        raise ValueError(f"{asked}: only ours and ours_plain take settings")
    pairs = [pair.partition("=") for pair in settings.split(",") if pair]
    return name, {key: value for key, _, value in pairs}


def asked_task(arguments: argparse.Namespace, size: str, settings: dict[str, str]) -> Task:
    """The task that the command line defines, with the `settings` of a contender."""
    workload = {
        "device": arguments.device,
        "device_name": find_device(arguments.device).name,
        "model": with_vocabulary(SIZES[size], arguments.vocab_size),
        "seq_len": arguments.seq_len,
        "micro_batch_rows": arguments.batch_rows,
        "accumulate": 1,
        "precision": arguments.precision,
        "compile": arguments.device == "cuda",  # the default of a run
    }
    if fixed := workload.keys() & settings.keys() - {"precision", "compile"}:
        raise ValueError(f"{', '.join(fixed)}: must be the same for every contender, drop it")
    return Task(
        size=size,
        vocab_size=arguments.vocab_size,
        workload=Workload.model_validate(workload | settings),
        rows=tuple(arguments.rows or doublings(arguments.batch_rows)),
        windows=arguments.windows,
        seconds=arguments.seconds,
    )


def check(task: Task, device: Device) -> None:
    """Check that the device can compute the task.

    Raises:
        ValueError: the device cannot.
    """
    for rows in task.rows:
        if task.workload.batch_rows % rows:
            raise ValueError(
                f"--rows {rows} does not divide --batch-rows {task.workload.batch_rows}"
            )
    task.workload.require_possible_on(device)


def doublings(number: int) -> list[int]:
    """`number` and its halves in ascending order: 3, 6, 12, 24, 48."""
    halves = [number]
    while halves[0] % 2 == 0:
        halves.insert(0, halves[0] // 2)
    return halves


def _presence(name: str, device: Device) -> Figures:
    """The contender's version, and under `absent` the reason if it cannot run."""
    contender = CONTENDERS[name]
    if contender.needs_gpu and device.kind != "cuda":
        return {"version": "", "absent": "needs a GPU"}
    lacking = [name for name in contender.packages if find_spec(name) is None]
    if lacking:
        absent = f"not installed: {', '.join(lacking)} (pip install {contender.install})"
        return {"version": "", "absent": absent}
    package = contender.packages[0]
    try:
        return {"version": f"{package} {version(package)}"}
    except PackageNotFoundError:
        return {"version": package}  # from a checkout


def try_in_process(name: str, task: Task, limit: float) -> Figures:
    """Run a contender in a separate process: its trials, and under `failed` the last error."""
    with tempfile.TemporaryDirectory(prefix="zeroflow-bench-") as folder:
        file, output = Path(folder, "trials.json"), Path(folder, "output.txt")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",  # an empty compile cache for each
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        command = [sys.executable, __file__, "--run", name, task.model_dump_json(), str(file)]
        failed = None
        with output.open("wb") as sink:
            process = subprocess.Popen(
                command, env=environment, stdout=sink, stderr=sink, start_new_session=True
            )
            try:
                code = process.wait(limit)
                failed = _last_line(output) or f"exit code {code}" if code else None
            except subprocess.TimeoutExpired:
                failed = f"stopped after {limit:.0f} s (--limit)"
            finally:
                _end_family(process)
        trials = json.loads(file.read_text()) if file.exists() else []
    return {"trials": trials} | ({"failed": failed} if failed else {})


def _end_family(process: subprocess.Popen[bytes]) -> None:
    """End the process and its compile workers."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(output: Path) -> str:
    lines = [line for line in output.read_text(errors="replace").split("\n") if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (errors or lines or [""])[-1].strip()[:200]


def _outcome(facts: Figures) -> str:
    if best := facts.get("best"):
        ended = f"; then {facts['failed']}" if "failed" in facts else ""
        return f"{best['tokens_per_second']:,.0f} tokens/s, {best['rows']} rows{ended}"
    return str(facts.get("absent") or facts.get("failed") or "not measured yet")


# Reporting


def report(results: Figures) -> str:
    """The table in Markdown."""
    device, settings = results["device"], results["settings"]
    machine = results["machine"]
    head = ["size", "", "version", "rows", "tokens/s", "fastest", "ours / contender", "MFU %"]
    head += [
        "TFLOP/s",
        "peak GB",
        "first step s",
        "spread %",
        "loss",
        "busy elsewhere",
        "CPU s/step",
    ]
    rows = []
    for facts in results["runs"]:
        row = [facts["size"], facts["contender"], facts["version"]]
        if best := facts.get("best"):
            fastest = settings["batch_rows"] * settings["seq_len"] / min(best["windows"])
            row += [str(best["rows"]), f"{best['tokens_per_second']:,.0f}", f"{fastest:,.0f}"]
            row += [_ratio(results, facts)]
            row += [f"{100 * best['mfu']:.1f}" if "mfu" in best else "-", f"{best['tflops']:.3g}"]
            row += [f"{best['peak_gb']:.1f}", f"{best['first_step_seconds']:.1f}"]
            row += [f"{100 * best['spread']:.1f}", "{:.2f} → {:.2f}".format(*best["losses"])]
            row += [f"{best['busy_elsewhere']:.1f}", f"{best['cpu_seconds_a_step']:.3f}"]
        else:
            row += ["-", _state(facts), *["-"] * 10]
        rows.append(row)
    rule = ["---", "---", "---", *["---:"] * (len(head) - 3)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *rows])
    notes = [
        f"{facts['size']}, {facts['contender']}: {_outcome(facts)}\n"
        for facts in results["runs"]
        if "absent" in facts or "failed" in facts
    ]
    notes = [*_leads(results), *notes]
    anchors = ", ".join(
        f"{anchor['burst_tflops']:.3g} / {anchor['sustained_tflops']:.3g}"
        for anchor in results["matmul"]
    )
    anchor_n = results["matmul"][0]["n"] if results["matmul"] else 0
    return (
        f"{device['name']}, torch {machine['torch']}, {settings['precision']}; context "
        f"{settings['seq_len']:,}, vocabulary {settings['vocab_size']:,}, "
        f"{settings['batch_rows']} rows per step; median of "
        f"{settings['rounds'] * settings['windows']} windows\n\n"
        f"{table}\n"
        f"Matrix product of {anchor_n}, TFLOP/s in a burst / sustained, before and after: "
        f"{anchors}\n\n"
        f"MFU = {results['mfu']}: {_peak(device)}\n\n" + "\n".join(notes)
    )


def _state(facts: Figures) -> str:
    """The reason in a word why a contender has no figures."""
    if "absent" in facts:
        return "absent"
    if "out of memory" in facts.get("failed", ""):
        return "out of memory"
    return "failed" if "failed" in facts else "not measured yet"


def _leads(results: Figures) -> list[str]:
    """Our speed relative to the fastest other trainer, for each size."""
    lines = []
    for size in results["settings"]["sizes"]:
        runs = [run for run in results["runs"] if run["size"] == size and "best" in run]
        peers = [run for run in runs if not run["contender"].startswith("ours")]
        if peers:
            peer = max(peers, key=_speed)
            lines += [
                f"{size}: {run['contender']} / {peer['contender']}, the fastest other trainer: "
                f"{_speed(run) / _speed(peer):.2f}\n"
                for run in runs
                if run not in peers
            ]
    return lines


def _speed(facts: Figures) -> float:
    return float(facts["best"]["tokens_per_second"])


def _peak(device: Figures) -> str:
    peak = device["peak_flops"]
    return f"{peak / 1e12:.0f} TFLOP/s" if peak else "not known for this device"


def _ratio(results: Figures, facts: Figures) -> str:
    mine = [run for run in results["runs"] if run["size"] == facts["size"] and "best" in run]
    first = next((run for run in mine if run["contender"].startswith("ours")), None)
    if first is None:
        return ""
    ratio = first["best"]["tokens_per_second"] / facts["best"]["tokens_per_second"]
    return f"{ratio:.2f}"


def draw(results: Figures, file: Path) -> None:
    """Draw bars of tokens per second, with one panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sizes = results["settings"]["sizes"]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(5 * len(sizes), 3.2), squeeze=False, layout="constrained"
    )
    for size, panel in zip(sizes, panels[0], strict=True):
        runs = [run for run in results["runs"] if run["size"] == size and "best" in run]
        speeds = [run["best"]["tokens_per_second"] for run in runs]
        mine = [run["contender"].startswith("ours") for run in runs]
        colors = ["tab:blue" if our else "tab:gray" for our in mine]
        bars = panel.barh([run["contender"] for run in runs], speeds, color=colors)
        labels = [
            f"{speed:,.0f}" + (f"  {run['best']['mfu']:.1%}" if "mfu" in run["best"] else "")
            for speed, run in zip(speeds, runs, strict=True)
        ]
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set_xlim(0, 1.45 * max(speeds, default=1))
        panel.invert_yaxis()
        panel.set_title(size)
        panel.set_xlabel("tokens/s  (MFU)" if results["device"]["peak_flops"] else "tokens/s")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results["device"]["name"], fontsize=10)
    figure.savefig(file, dpi=150)


def write(results: Figures, folder: Path) -> None:
    """Write the figures, the table and the picture to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (folder / "train_speed.json").write_text(text, encoding="utf-8")
    (folder / "train_speed.md").write_text(report(results), encoding="utf-8")
    draw(results, folder / "train_speed.png")


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the shape; the defaults depend on the device."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seq-len", type=int, help="context (2048; 256 on a CPU)")
    parser.add_argument(
        "--vocab-size", type=int, help="default: Llama-3.1's; on a CPU the sample's"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="default: bf16; fp32 on a CPU"
    )


def settle_shape(arguments: argparse.Namespace) -> Device:
    """Fill in the defaults of a run, and return the device."""
    device = find_device(arguments.device)
    gpu = device.kind == "cuda"
    sample = cast(int, TokenizerConfig.model_fields["vocab_size"].default)
    arguments.device = device.kind
    arguments.seq_len = arguments.seq_len or (2048 if gpu else 256)
    arguments.vocab_size = arguments.vocab_size or (NOMINAL_VOCABULARY if gpu else sample)
    arguments.precision = arguments.precision or ("bf16" if gpu else "fp32")
    return device


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return run(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"from {', '.join(CONTENDERS)}; ours:compile=false changes a setting of ours",
    )
    parser.add_argument("--fp8", action="store_true", help=f"add {_OURS_IN_FP8}")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: all; tiny on a CPU")
    add_shape(parser)
    parser.add_argument("--batch-rows", type=int, help="rows of a step (48; 4 on a CPU)")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        help="rows of a micro-batch to try (doublings); in descending order, each is tried only if "
        "memory ran out with the one before it",
    )
    parser.add_argument("--windows", type=int, default=3, help="windows; the median counts (3)")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of all contenders (1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds of a window (3)")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="maximum seconds for a contender (600)"
    )
    parser.add_argument("--out", type=Path, default=Path("data_cache/benchmarks/train_speed"))
    arguments = parser.parse_args()
    device = settle_shape(arguments)
    arguments.sizes = arguments.sizes or (list(SIZES) if device.kind == "cuda" else ["tiny"])
    arguments.batch_rows = arguments.batch_rows or (48 if device.kind == "cuda" else 4)
    arguments.contenders += [_OURS_IN_FP8] if arguments.fp8 else []
    try:
        for asked in arguments.contenders:
            check(asked_task(arguments, arguments.sizes[0], parse_contender(asked)[1]), device)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # its cleanup ends the contender
    results: Figures = {}

    def save(newest: Figures) -> None:
        if any("best" in facts for facts in newest["runs"]):
            results.update(newest)
            write(results, arguments.out)

    compare(arguments, device, save)
    if not results:
        sys.exit("nothing was measured, so earlier figures are kept")
    sys.stdout.write(report(results))
    return None


if __name__ == "__main__":
    main()

"""Compare pipelines from Parquet text to packed rows of tokens on disk.

Every contender gets the same files, tokenizer and cores, and runs in a separate process, once on
the text and once on several copies of it. The difference is its steady state, and the rest of the
first run is start-up. See benchmarks/README.md for the method.
"""

import argparse
import glob
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

# Only the standard library is imported here: the time of a contender includes its own imports

log = logging.getLogger(__name__)

SEQ_LEN = 2048
ROW_TOKENS = SEQ_LEN + 1
_BUILDERS = 2  # data_workers of a run, not imported from there: that would import torch
_BATCH_DOCUMENTS = 1000
_MEMMAP_PIECES = 1024
_READ_ROWS = 8
_READ_SECONDS = 3.0
_SAMPLE_SECONDS = 0.1

Figures = dict[str, float]


class Job(NamedTuple):
    """Input of a contender."""

    text: Path
    """Folder with Parquet files only."""

    tokenizer: Path
    """Folder with tokenizer.json and tokenizer_config.json."""

    out: Path
    """Empty folder."""

    threads: int


class Contender(NamedTuple):
    run: Callable[[Job], Figures]
    packages: tuple[str, ...]
    """Required packages; the version of the first one is shown."""


# Text to rows on disk


def fetch(job: Job) -> Figures:
    """Copy the tokenizer and compare its fast encoder with Hugging Face's, once per tokenizer."""
    _fetched(job)
    return {}


def _fetched(job: Job) -> tuple[Any, Any]:
    from zeroflow.data.corpus import CorpusConfig, resolve_corpus
    from zeroflow.data.tokenizer import TokenizerConfig
    from zeroflow.data.tokenizer_origins import fetch_tokenizer

    files = CorpusConfig(data_mode="files", data_path=(str(job.text / "*.parquet"),))
    corpus = resolve_corpus(files).corpus
    config = TokenizerConfig(tokenizer_name=str(job.tokenizer))
    return corpus, fetch_tokenizer(config, corpus, job.out)


def build_ours(job: Job) -> Any:
    """Build the whole text: limits are high enough that nothing is left out."""
    from zeroflow.data.build import build_shards
    from zeroflow.data.builders import in_threads
    from zeroflow.data.shards import ShardConfig

    corpus, tokenizer = _fetched(job)
    everything = 2**40 // ROW_TOKENS
    config = ShardConfig(seq_len=SEQ_LEN, train_rows=everything, validation_rows=everything)
    with in_threads(_BUILDERS) as builders:
        return build_shards(config, corpus, tokenizer, job.out, builders=builders)


def ours(job: Job) -> Figures:
    """Resolve, fetch and build as a run does: fingerprints, validation, checksums, syncs.

    `ours` finds the tokenizer in the cache, like every run except the first; `ours_first` does not.
    """
    shards = build_ours(job)
    return {"tokens": shards.train.document_tokens + shards.validation.document_tokens}


def datatrove(job: Job) -> Figures:
    """`ParquetReader` to `DocumentTokenizer`, with one task per core, as in its example.

    In its favour, metadata columns are not read and documents are not shuffled. Its readers cut the
    .ds files into windows, so rows need no second pass.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = ParquetReader(str(job.text), glob_pattern="*.parquet", read_metadata=False)
    tokenize = DocumentTokenizer(
        output_folder=str(job.out / "tokens"),
        tokenizer_name_or_path=str(job.tokenizer / "tokenizer.json"),
        eos_token=_end_of_text(job.tokenizer),
        shuffle_documents=False,  # no other contender shuffles what it writes
    )
    LocalPipelineExecutor(
        pipeline=[reader, tokenize],
        tasks=job.threads,
        workers=job.threads,
        logging_dir=str(job.out / "logs"),
    ).run()
    row_bytes = 4 * ROW_TOKENS
    sizes = [file.stat().st_size for file in (job.out / "tokens").glob("*.ds")]
    return {"tokens": sum(size // row_bytes for size in sizes) * ROW_TOKENS}


def datasets_map(job: Job) -> Figures:
    """The recipe of transformers' run_clm.py: `tokenize`, then `group_texts`, both with `map`.

    As in the recipe, it also stores attention_mask and labels, drops the incomplete row at the end
    of every 1,000 documents, and leaves special tokens to the tokenizer.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(job.tokenizer), trust_remote_code=False)

    def tokenize(columns: dict[str, list[str]]) -> Any:
        return tokenizer(columns["text"])

    def group(columns: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(lists)) for name, lists in columns.items()}
        end = len(joined["input_ids"]) // ROW_TOKENS * ROW_TOKENS
        starts = range(0, end, ROW_TOKENS)
        rows = {name: [ids[i : i + ROW_TOKENS] for i in starts] for name, ids in joined.items()}
        return rows | {"labels": rows["input_ids"].copy()}

    text = load_dataset("parquet", data_dir=str(job.text), split="train")
    tokens = text.map(
        tokenize, batched=True, num_proc=job.threads, remove_columns=text.column_names
    )
    return {"tokens": len(tokens.map(group, batched=True, num_proc=job.threads)) * ROW_TOKENS}


def nanogpt(job: Job) -> Figures:
    """prepare.py of nanoGPT: `map` to ids, then 1,024 pieces into one memory-mapped file.

    Two changes: batches of 1,000 with `tokenizers` instead of single documents with tiktoken's
    GPT-2, and uint32, which the vocabulary needs.
    """
    import numpy as np
    from datasets import load_dataset

    tokenizer, end = _hugging_face(job.tokenizer)

    def tokenize(columns: dict[str, list[str]]) -> dict[str, list[Any]]:
        encodings = tokenizer.encode_batch_fast(columns["text"], add_special_tokens=False)
        ids = [[*encoding.ids, end] for encoding in encodings]
        return {"ids": ids, "len": [len(document) for document in ids]}

    text = load_dataset("parquet", data_dir=str(job.text), split="train")
    documents = text.map(
        tokenize, batched=True, num_proc=job.threads, remove_columns=text.column_names
    )
    total, place = int(np.sum(documents["len"])), 0
    flat = np.memmap(job.out / "train.bin", dtype=np.uint32, mode="w+", shape=(total,))
    pieces = min(_MEMMAP_PIECES, len(documents))
    for index in range(pieces):
        piece = documents.shard(num_shards=pieces, index=index, contiguous=True)
        ids = np.concatenate(piece.with_format("numpy")["ids"])
        flat[place : place + len(ids)] = ids
        place += len(ids)
    flat.flush()
    return {"tokens": total // ROW_TOKENS * ROW_TOKENS}


def script(job: Job) -> Figures:
    """The shortest script: all ids in memory, then one memory-mapped file. No checks, no index."""
    import numpy as np

    tokenizer, end = _hugging_face(job.tokenizer)
    pieces = []
    for texts in _texts(job.text):
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint32))
    rows = sum(map(len, pieces)) // ROW_TOKENS
    flat = np.memmap(job.out / "train.bin", np.uint32, mode="w+", shape=(rows, ROW_TOKENS))
    flat[:] = np.concatenate(pieces)[: flat.size].reshape(flat.shape)
    flat.flush()
    return {"tokens": flat.size}


# Tokenizer libraries only


def tokenizers(job: Job) -> Figures:
    tokenizer, _ = _hugging_face(job.tokenizer)

    def encode(texts: list[str]) -> int:
        return sum(map(len, tokenizer.encode_batch_fast(texts, add_special_tokens=False)))

    return _encode_twice(job, encode)


def fastokens(job: Job) -> Figures:
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_file(str(job.tokenizer / "tokenizer.json"))

    def encode(texts: list[str]) -> int:
        ids, _ = tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        return len(ids) // 4

    return _encode_twice(job, encode)


def _encode_twice(job: Job, encode: Callable[[list[str]], int]) -> Figures:
    """Encode twice, because libraries cache words."""
    batches = list(_texts(job.text))
    started = time.perf_counter()
    tokens = sum(map(encode, batches))
    between = time.perf_counter()
    assert tokens == sum(map(encode, batches))
    ended = time.perf_counter()
    return {"tokens": tokens, "first": between - started, "again": ended - between}


# Reading rows


def reads(job: Job) -> Figures:
    """Read random rows of our shards, and the batches of a training run, from the page cache."""
    import numpy as np

    from zeroflow.data.batches import Batches, BatchShape
    from zeroflow.data.order import Order, Segment
    from zeroflow.data.rows import Rows

    rows = Rows(build_ours(job), "train")
    random = np.random.default_rng(0)
    ids = random.integers(len(rows), size=(100_000, _READ_ROWS))
    order = Order([Segment(batch=0, rows=len(rows))], batch_rows=_READ_ROWS, seed=0)
    batches = Batches(rows, BatchShape(1, 1, _READ_ROWS), order)
    rows_read = _READ_ROWS * _repetitions(lambda i: rows[ids[i % len(ids)]], time.process_time)
    fed = _repetitions(batches.micro_batches, time.perf_counter)
    return {
        "rows": len(rows),
        "rows_per_cpu_second": rows_read / _READ_SECONDS,
        "batches_per_second": fed / _READ_SECONDS,
    }


def _repetitions(action: Callable[[int], object], clock: Callable[[], float]) -> int:
    action(0)
    count, end = 0, clock() + _READ_SECONDS
    while clock() < end:
        action(count)
        count += 1
    return count


PATHS = {
    "ours": Contender(ours, ("zeroflow",)),
    "ours_first": Contender(ours, ("zeroflow",)),
    "script": Contender(script, ("tokenizers", "pyarrow", "numpy")),
    "nanogpt": Contender(nanogpt, ("datasets", "tokenizers", "numpy")),
    "datatrove": Contender(datatrove, ("datatrove", "tokenizers", "pyarrow")),
    "datasets_map": Contender(datasets_map, ("datasets", "transformers")),
}
LIBRARIES = {
    "fastokens": Contender(fastokens, ("fastokens", "pyarrow")),
    "tokenizers": Contender(tokenizers, ("tokenizers", "pyarrow")),
}
READS = {"reads": Contender(reads, ("zeroflow", "torch"))}
CONTENDERS = PATHS | LIBRARIES | READS
PREPARED = {"ours": "fetch", "reads": "fetch"}
"""Preparation that is not timed: a tokenizer is fetched once, not for every build."""

STEPS = {"fetch": Contender(fetch, ("zeroflow",))}


# Shared by contenders


def _texts(folder: Path) -> Iterator[list[str]]:
    import pyarrow.parquet as pq

    for path in sorted(folder.glob("*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_DOCUMENTS, columns=["text"]):
            yield batch.column(0).to_pylist()


def _end_of_text(folder: Path) -> str:
    token = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    return token["content"] if isinstance(token, dict) else token


def _hugging_face(folder: Path) -> tuple[Any, int]:
    """The tokenizer, set to treat special tokens in a document as text, and the end-of-text id."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer, tokenizer.token_to_id(_end_of_text(folder))


# Measuring


class ContenderFailed(Exception):
    pass


def measure(name: str, job: Job) -> Figures:
    """Run a contender in a separate process, and add time and memory to its own figures.

    Peak memory and CPU time are totals of the process and its children; shared memory is counted
    once. `busy_elsewhere` is the number of cores that other programs used at the same time.
    """
    environment = os.environ | {
        "HF_HOME": str(job.out / "hub"),  # no cache of an earlier run
        "HF_HUB_OFFLINE": "1",
        "RAYON_NUM_THREADS": str(job.threads),
    }
    environment.pop("TOKENIZERS_PARALLELISM", None)
    output = job.out / "output.txt"
    command = [sys.executable, __file__, "--run", name, *map(str, job)]
    with output.open("wb") as sink:
        started, busy, waited = time.perf_counter(), _busy_seconds(), _waited_seconds()
        process = subprocess.Popen(command, env=environment, stdout=sink, stderr=sink)
        with _Sampler(process.pid) as sampled:
            code = process.wait()
        seconds = time.perf_counter() - started
        busy, waited = _busy_seconds() - busy, _waited_seconds() - waited
    if code:
        lines = output.read_text(errors="replace").split("\n")
        raise ContenderFailed(next((line for line in reversed(lines) if line.strip()), str(code)))
    figures: Figures = json.loads((job.out / "figures.json").read_text())
    cpu_seconds = max(waited, sampled.cpu_seconds)
    return figures | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "busy_elsewhere": max(0.0, (busy - cpu_seconds) / seconds),
        "peak_mb": max(figures["peak_mb"], sampled.peak_mb),
    }


def _busy_seconds() -> float:
    """CPU time of all programs on the machine, including time stolen by the hypervisor."""
    import psutil

    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _waited_seconds() -> float:
    """CPU time of ended children, and of their children if they waited for them."""
    times = os.times()
    return times.children_user + times.children_system


class _Sampler:
    """Memory and CPU time of a process and its children, sampled while the block runs."""

    def __init__(self, pid: int) -> None:
        self.peak_mb = 0.0
        self._pid, self._ended = pid, threading.Event()
        self._cpu: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch)

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._ended.wait(_SAMPLE_SECONDS):
            try:
                process = psutil.Process(self._pid)
                family = [process, *process.children(recursive=True)]
            except psutil.Error:
                return
            used = 0
            for member in family:
                try:
                    times = member.cpu_times()
                    self._cpu[member.pid] = times.user + times.system
                    # a process without children reports its exact peak itself
                    used += member.memory_full_info().pss if len(family) > 1 else 0
                except psutil.Error:
                    continue  # it has just ended
            self.peak_mb = max(self.peak_mb, used / 1e6)


def run(name: str, text: str, tokenizer: str, out: str, threads: str) -> None:
    """Entry point of the contender's process."""
    job = Job(Path(text), Path(tokenizer), Path(out), int(threads))
    figures = (CONTENDERS | STEPS)[name].run(job)
    status = Path("/proc/self/status").read_text()
    high_water_kib = int(status.split("VmHWM:")[1].split()[0])
    (job.out / "figures.json").write_text(json.dumps(figures | {"peak_mb": high_water_kib / 1e3}))


def text_bytes(folder: Path) -> int:
    return sum(len(text.encode()) for texts in _texts(folder) for text in texts)


def lay_out(files: list[Path], folder: Path, repeat: int) -> Path:
    """Copy the files `repeat` times: some contenders would treat links to one file as one file."""
    folder.mkdir()
    for number in range(repeat):
        for index, file in enumerate(files):
            shutil.copyfile(file, folder / f"{number:03d}_{index:05d}.parquet")
    return folder


# Reporting


def steady_state(once: Figures, more: Figures, text_mb: float, repeat: int) -> Figures:
    """Time of one more repetition of the text."""
    one = {key: (more[key] - once[key]) / (repeat - 1) for key in ("seconds", "cpu_seconds")}
    tokens = (more["tokens"] - once["tokens"]) / (repeat - 1)
    return one | {
        "start_up_seconds": once["seconds"] - one["seconds"],
        "mtok_per_second": tokens / one["seconds"] / 1e6,
        "mb_per_second": text_mb / one["seconds"],
    }


def report(results: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    machine, found, text_mb = results["machine"], results["contenders"], results["text_mb"]
    many = f"{results['repeat']}x"
    measured = {name: facts for name, facts in found.items() if "absent" not in facts}
    paths = {name: facts for name, facts in measured.items() if name in PATHS}
    sections = [
        f"{machine['cpu']}, {machine['threads']} cores, Python {machine['python']}; {text_mb:.1f} "
        f"MB of text in {results['files']} files, and {many} as much; rows of {ROW_TOKENS:,} "
        f"tokens; median of {results['rounds']}\n"
    ]
    if paths:
        head = ["", "version", "s", f"s, {many}", "start-up s", "steady s", "Mtok/s", "MB/s"]
        head += ["s / ours", "steady s / ours"]
        rows = []
        for name, facts in paths.items():
            once, more, steady = facts["once"], facts["repeated"], facts["steady"]
            row = [name, facts["version"], f"{once['seconds']:.1f}", f"{more['seconds']:.1f}"]
            row += [f"{steady['start_up_seconds']:.1f}", f"{steady['seconds']:.1f}"]
            row += [f"{steady['mtok_per_second']:.2f}", f"{steady['mb_per_second']:.1f}"]
            row += [
                _ratio(paths, name, "once", "seconds"),
                _ratio(paths, name, "steady", "seconds"),
            ]
            rows.append(row)
        sections.append(_table(head, rows))
        head = ["", "tokens", "peak MB", f"peak MB, {many}", "CPU s", f"CPU s, {many}"]
        head += ["CPU s / ours", "steady CPU s / ours", "busy elsewhere", f"{many}"]
        rows = []
        for name, facts in paths.items():
            once, more = facts["once"], facts["repeated"]
            row = [name, f"{once['tokens']:,.0f}", f"{once['peak_mb']:.0f}"]
            row += [f"{more['peak_mb']:.0f}"]
            row += [f"{once['cpu_seconds']:.1f}", f"{more['cpu_seconds']:.1f}"]
            row += [_ratio(paths, name, part, "cpu_seconds") for part in ("once", "steady")]
            row += [f"{runs['busy_elsewhere']:.1f}" for runs in (once, more)]
            rows.append(row)
        sections.append(_table(head, rows))
    rows = []
    for name in measured.keys() & LIBRARIES.keys():
        once = measured[name]["once"]
        row = [name, measured[name]["version"], f"{once['tokens']:,.0f}"]
        row += [f"{once['tokens'] / once[time_] / 1e6:.2f}" for time_ in ("first", "again")]
        row += [f"{text_mb / once[time_]:.1f}" for time_ in ("first", "again")]
        rows.append([*row, f"{once['busy_elsewhere']:.1f}"])
    if rows:
        head = ["library alone", "version", "tokens", "Mtok/s", "again", "MB/s", "again"]
        sections.append(_table([*head, "busy elsewhere"], sorted(rows)))
    if "reads" in measured:
        once = measured["reads"]["once"]
        keys = ("rows", "rows_per_cpu_second", "batches_per_second", "busy_elsewhere")
        head = ["reads", "rows", "random rows / CPU s", f"batches of {_READ_ROWS} / s"]
        row = ["ours", *(f"{once[key]:,.0f}" for key in keys[:-1]), f"{once[keys[-1]]:.1f}"]
        sections.append(_table([*head, "busy elsewhere"], [row]))
    absent = [f"{name}: {facts['absent']}\n" for name, facts in found.items() if "absent" in facts]
    return "\n".join(sections + absent)


def _ratio(paths: dict[str, Any], name: str, part: str, key: str) -> str:
    if "ours" not in paths:
        return ""
    return f"{paths[name][part][key] / paths['ours'][part][key]:.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *rows])


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the requested contenders; if one cannot run, `absent` has the reason."""
    pattern = Path(arguments.text)
    pattern = pattern / "**" / "*.parquet" if pattern.is_dir() else pattern
    files = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise SystemExit(f"--text {arguments.text} matches no Parquet file")
    texts = {"once": lay_out(files, folder / "once", 1)}
    texts["repeated"] = lay_out(files, folder / "repeated", arguments.repeat)
    found = {name: _presence(CONTENDERS[name]) for name in arguments.only}
    # Rounds outermost, so that a busy minute of a shared machine does not affect one contender only
    for _, name, part in product(range(arguments.rounds), found, texts):
        facts = found[name]
        if "absent" in facts or (part == "repeated" and name not in PATHS):
            continue
        out = Path(tempfile.mkdtemp(dir=folder))
        try:
            job = Job(texts[part], arguments.resolve_tokenizer(), out, arguments.threads)
            if name in PREPARED:
                measure(PREPARED[name], job)
            figures = measure(name, job)
            facts.setdefault(f"{part}_rounds", []).append(figures)
            log.info("%s, %s: %.1f s", name, part, figures["seconds"])
        except ContenderFailed as failure:
            facts["absent"] = f"failed: {failure}"
        shutil.rmtree(out)
    text_mb = text_bytes(texts["once"]) / 1e6
    for name, facts in found.items():
        for part in texts:
            if runs := facts.get(f"{part}_rounds"):
                # The median: the steady state is a difference, which one fast run would distort
                in_order = sorted(runs, key=lambda figures: figures["seconds"])
                facts[part] = in_order[(len(runs) - 1) // 2]
        if name in PATHS and "absent" not in facts:
            pair = facts["once"], facts["repeated"]
            facts["steady"] = steady_state(*pair, text_mb, arguments.repeat)
    machine = {
        "cpu": _cpu(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    return {
        "machine": machine,
        "text_mb": text_mb,
        "files": len(files),
        "repeat": arguments.repeat,
        "rounds": arguments.rounds,
        "contenders": found,
    }


def _presence(contender: Contender) -> dict[str, Any]:
    """The contender's version, and under `absent` the missing packages."""
    package = contender.packages[0]
    if lacking := [name for name in contender.packages if find_spec(name) is None]:
        return {"version": package, "absent": f"not installed: {', '.join(lacking)}"}
    try:
        return {"version": f"{package} {version(package)}"}
    except PackageNotFoundError:
        return {"version": package}  # zeroflow from a checkout


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return run(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", required=True, help="folder or glob of Parquet files")
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder of a tokenizer")
    parser.add_argument("--repeat", type=int, default=4, help="repetitions of the text (4)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; the median counts (1)")
    parser.add_argument("--threads", type=int, default=2, help="cores for each contender (2)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    if arguments.repeat < 2:
        parser.error("--repeat must be 2 or more, because the steady state is a difference")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    with tempfile.TemporaryDirectory(prefix="zeroflow-bench-") as folder:
        results = compare(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(report(results))
    return None


if __name__ == "__main__":
    main()

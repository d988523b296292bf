"""README.md of an exported model: its data, training, results, and how to use and reproduce it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from zeroflow.artifacts import JsonObject
from zeroflow.data.corpus import FINEWEB_EDU, CorpusConfig
from zeroflow.data.tokenizer import LLAMA_TOKENIZER, TRAINED_TOKENIZER, TokenizerConfig
from zeroflow.inference import evaluation
from zeroflow.inference.evaluation import Evaluation
from zeroflow.inference.export import Format
from zeroflow.report import plan_page
from zeroflow.report.outcome import failures
from zeroflow.report.pages import Page, Part, Table
from zeroflow.report.records import RunReport
from zeroflow.run_folder import RunFolder
from zeroflow.settings import existing
from zeroflow.settings.flags import settings
from zeroflow.settings.run_config import leaves
from zeroflow.settings.settled import Settled
from zeroflow.text.markup import Markdown, escaped, shell_command
from zeroflow.training import goodput
from zeroflow.training.extension import extensions
from zeroflow.training.initial import RUN
from zeroflow.training.job import TrainingJob, read_job
from zeroflow.training.metrics import METRICS, TABLE, MetricsRecord
from zeroflow.units import count, parameter_count, vocabulary

_PLACES = ("run_name", "cache_dir", "sweep", "register_")
"""Settings that name a run or its model, which a reader chooses for themselves."""

_INIT = "init_from"
"""Name of the setting of the model that a run starts from."""


def model_card(folder: RunFolder, *, step: int, format: Format) -> str:
    """Return the model card of a run's checkpoint, in Markdown with metadata for the Hub.

    It has no paths of this machine: files of text are named without their folders.

    Args:
        step: step of the checkpoint.
    """
    run = existing.load(folder.cache.path, folder.name)
    job = read_job(folder)
    report = RunReport.read_if_exists(folder.report)
    records = [record for record in METRICS.read(folder.metrics) if record.step <= step]
    parts: list[Part] = [
        Markdown(f"# {escaped(folder.name)}"),
        escaped(
            f"A language model with {parameter_count(job.model.parameters)} parameters of the "
            f"{'Qwen3' if job.model.qk_norm else 'LLaMA'} architecture, trained from "
            f"{_start(run)} with zeroflow for {count(step, 'step')}, "
            f"{step * job.training.workload.batch_tokens:,} tokens. It continues texts; it was not "
            "trained to answer questions or follow instructions."
        ),
        *_use(folder.name, format, has_tokenizer=job.tokenizer.path is not None),
        Markdown("## Data"),
        Table(("", ""), _data(run, job).items()),
        Markdown("## Results"),
        Table(("", ""), _results(records).items()),
        *(Markdown(f"**The run failed:** {escaped(why)}.") for why in failures(folder)),
        *_scores(evaluation.read(folder).of(step)),
        *_time(folder, report if report and report.steps == step else None),
        Markdown("## Training"),
        Table(("setting", "value"), _training(job).items()),
        *_reproduce(run, job),
    ]
    metadata = yaml.safe_dump(_metadata(run, format), sort_keys=False)
    return f"---\n{metadata}---\n\n{Page(tuple(parts)).linked}\n"


def _metadata(run: Settled, format: Format) -> JsonObject:
    """Return the metadata that the Hub reads from a card."""
    dataset = _dataset(run.data)
    return {
        "pipeline_tag": "text-generation",
        **({"library_name": "transformers"} if format == "hf" else {}),
        "tags": ["zeroflow", *(["gguf"] if format == "gguf" else [])],
        **({"datasets": [dataset]} if dataset else {}),
        **({"base_model": base} if (base := _base_on_hub(run)) else {}),
    }


def _start(run: Settled) -> str:
    """Return the weights that the run started from, as text."""
    source = run.model.init_from
    return f"the weights of {_named(('init_from',), source)}" if source else "random weights"


def _source(run: Settled) -> dict[str, str]:
    """Return the facts about the model that the run started from; empty for random weights."""
    name, initial = run.model.init_from, run.initial
    if not name or not initial:
        return {}
    pinned = name.startswith(RUN) or _base_on_hub(run)
    start = _start(run) if pinned else f"{_start(run)}, digest {initial.digest}"
    licence = initial.licence or "not recorded"
    return {"Start": start, "Licence of the start": f"{licence}; it also applies to this model"}


def _base_on_hub(run: Settled) -> str | None:
    """Return the name on the Hub of the model that the run started from."""
    name, _, revision = (run.model.init_from or "").rpartition("@")
    return name if run.initial and revision == run.initial.digest else None


def _use(name: str, format: Format, *, has_tokenizer: bool) -> Iterator[Part]:
    yield Markdown("## Use")
    if format == "gguf":
        file = f"{name}.gguf"
        yield Markdown("In the folder of this file, with llama.cpp:")
        yield _shell(shell_command(["llama-server", "--model", file]))
        yield Markdown("With Ollama:")
        modelfile = f'FROM ./{file}\\nTEMPLATE "{{{{ .Prompt }}}}"\\n'
        yield _shell(f"printf '{modelfile}' > Modelfile\nollama create {name} -f Modelfile")
        return
    if not has_tokenizer:
        yield Markdown("The model was trained on generated token ids, and has no tokenizer.")
        return
    yield Markdown("In the folder of this file, with transformers:")
    yield Markdown(
        "```python\nfrom transformers import pipeline\n\n"
        'print(pipeline("text-generation", ".")("The sea")[0]["generated_text"])\n```'
    )
    yield Markdown("With vLLM, as a server of OpenAI's completions API:")
    yield _shell("vllm serve .")


def _shell(command: str) -> Markdown:
    return Markdown(f"```sh\n{command}\n```")


def _data(run: Settled, job: TrainingJob) -> dict[str, str]:
    data, shards = run.data, job.shards
    repeated = job.order.coverage(job.training.steps)
    facts = {
        **_source(run),
        "Text": _text(data),
        "Revision": data.data_revision or "none",
        "Licence of the text": _licence(data),
        "Documents": f"{shards.documents:,}, {repeated.epochs:.2f} epochs of "
        f"{count(shards.train.rows, 'row')} of {shards.row_tokens - 1:,} tokens",
    }
    if job.tokenizer.path is None:
        return facts
    tokenizer = run.tokenizer
    revision = f", revision {tokenizer.tokenizer_revision}" if tokenizer.tokenizer_revision else ""
    return facts | {
        "Tokenizer": f"{_tokenizer_name(tokenizer)}{revision}, {job.tokenizer.vocab_size:,} tokens",
        "Licence of the tokenizer": _tokenizer_licence(tokenizer),
    }


def _dataset(data: CorpusConfig) -> str | None:
    """Return the name of the dataset on the Hub."""
    return FINEWEB_EDU if data.data_mode == "fineweb" else data.dataset


def _text(data: CorpusConfig) -> str:
    match data.data_mode:
        case "fineweb":
            return f"{FINEWEB_EDU}, {data.fineweb_subset}"
        case "hub":
            return ", ".join(filter(None, (data.dataset, data.dataset_config)))
        case "files":
            return f"own files: {', '.join(Path(path).name for path in data.data_path)}"
        case "sample":
            return "the source files of Python's standard library"
    return "synthetic token ids"


def _licence(data: CorpusConfig) -> str:
    match data.data_mode:
        case "fineweb":
            return "ODC-By 1.0, and the terms of use of Common Crawl"
        case "hub":
            return "see the page of the dataset on the Hugging Face Hub"
        case "files":
            return "not recorded: the files are the author's own"
        case "sample":
            return "Python Software Foundation License, version 2"
    return "none: generated"


def _tokenizer_name(tokenizer: TokenizerConfig) -> str:
    name = tokenizer.tokenizer_name
    if name == TRAINED_TOKENIZER:
        return "a byte-level BPE, trained on the same text"
    # The name on the Hub has an owner and a name; other names with slashes are paths
    return name if tokenizer.tokenizer_revision else Path(name).name


def _tokenizer_licence(tokenizer: TokenizerConfig) -> str:
    if tokenizer.tokenizer_name == TRAINED_TOKENIZER:
        return "as that of the text"
    if tokenizer.tokenizer_name == LLAMA_TOKENIZER:
        return "Llama 3.1 Community License"
    if tokenizer.tokenizer_revision:
        return "see the page of the tokenizer on the Hugging Face Hub"
    return "not recorded"


def _results(records: list[MetricsRecord]) -> dict[str, str]:
    """Return the last logged losses."""
    latest: dict[str, str] = {}
    for name in ("loss", "val_loss", "val_error", "val_bpb"):
        metric = TABLE[name]
        values = [getattr(record, name, None) for record in records]
        found = [value for value in values if value is not None]
        if found:
            latest[metric.label] = metric.text(found[-1])
    return latest


def _scores(found: Evaluation | None) -> Iterator[Part]:
    """Yield the scores on texts and tasks, without the folders of files."""
    if found is None:
        return
    rows = [(Path(figure.of).name, figure.name, figure.text) for figure in found.figures()]
    yield Table(("text or task", "figure", "value"), rows, right="  r")
    if found.harness:
        yield escaped(f"Tasks of lm-evaluation-harness {found.harness}; ± is the standard error.")


def _time(folder: RunFolder, report: RunReport | None) -> Iterator[Part]:
    """Yield the account of the time, and for a finished run the comparison with its plan."""
    account = goodput.read(folder)
    yield Markdown("## Plan and time")
    yield escaped(
        f"Forward pass, backward pass and optimiser took {account.goodput:.1%} of "
        f"{account.wall:,.0f} s, with {count(account.restarts, 'restart')}."
    )
    if report and report.plan:
        head = ("", "predicted", "measured", "difference")
        yield Table(head, [plan_page.cells(row) for row in report.plan], right=" rrr")


def _training(job: TrainingJob) -> dict[str, str]:
    training, work, model = job.training, job.training.workload, job.model
    tags = job.tracking.tags
    versions = {k.removeprefix("version."): v for k, v in tags.items() if k.startswith("version.")}
    return {
        "layers": f"{model.num_hidden_layers}",
        "hidden size": f"{model.hidden_size:,}, feed-forward {model.intermediate_size:,}",
        "heads": f"{model.num_attention_heads} for queries, {model.num_key_value_heads} for keys "
        f"and values, {model.head_dim} features each",
        "vocabulary": f"{vocabulary(job.tokenizer.vocab_size, model.vocab_size)}, input and output "
        f"embeddings {'tied' if model.tie_word_embeddings else 'not tied'}",
        "context": f"{work.seq_len:,} tokens",
        "batch": f"{work.batch_tokens:,} tokens",
        "optimiser": ", ".join(f"{name} {value}" for name, value in leaves(work.optimizer)),
        "learning rate": f"{training.schedule.peak:g} at its peak, "
        f"{count(training.schedule.warmup_steps, 'warm-up step')}, {training.schedule.name}",
        "seed": str(training.seed),
        "device": f"{work.devices}, {work.arithmetic}",
        "versions": ", ".join(" ".join(item) for item in versions.items()),
        **({"commit of zeroflow": tags["git_commit"]} if "git_commit" in tags else {}),
    }


def _reproduce(run: Settled, job: TrainingJob) -> Iterator[Part]:
    yield Markdown("## Reproduce")
    if found := "; ".join(map(str, extensions(job.training.schedule))):
        yield escaped(
            f"The run was {found}. To repeat it, give this command a "
            "--run-name, run it first with the earlier --max-steps, and stop it at the steps named:"
        )
    else:
        yield Markdown(
            "This command trains on the same rows in the same order, from the same initial weights:"
        )
    yield _shell(shell_command(["zeroflow", "pretrain", *_flags(run)]))


def _flags(run: Settled) -> Iterator[str]:
    """Yield the flags of all settings that differ from the defaults on a machine without a GPU."""
    for setting in settings(type(run)):
        value: Any = run
        for name in setting.path:
            value = getattr(value, name, None)  # a setting of another optimiser
        if setting.path[-1] in _PLACES or value == setting.field.get_default():
            continue
        if run.initial and setting.path[0] in ("model", "tokenizer") and setting.path[-1] != _INIT:
            continue  # the model to start from has its own shape and tokenizer
        if isinstance(value, bool):
            yield setting.flag if value else setting.flag.replace("--", "--no-", 1)
        elif isinstance(value, tuple):
            yield from (setting.flag, *(Path(item).name for item in value))
        elif value is not None:
            yield f"{setting.flag}={_named(setting.path, value)}"


def _named(path: tuple[str, ...], value: Any) -> str:
    """Return a value as text, and a local path without its folders."""
    names = path[-1] in ("tokenizer_name", _INIT)
    local = isinstance(value, Path) or (names and Path(value).is_absolute())
    return Path(value).name if local else str(value)

"""Reads from a hub on loopback, in separate processes, because HF_ENDPOINT is read at import."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import TOKEN, Fault, Hub, Repo, fineweb_edu_repo, llama_tokenizer_repo

from zeroflow.data import hub as hubs
from zeroflow.data import hub_errors

PRELUDE = """
import json, sys
from pathlib import Path
from zeroflow.data import hub, slices
from zeroflow.data.corpus import (
    CorpusConfig,
    list_files,
    resolve_corpus,
)
from zeroflow.data.slices import plan_slices, read_documents, read_slice
from zeroflow.data.documents import Tally
from zeroflow.data.tokenizer import LLAMA_TOKENIZER, TokenizerConfig, resolve_tokenizer
from zeroflow.data.tokenizer_origins import fetch_tokenizer

cache = Path(sys.argv[1])
text = CorpusConfig(data_mode="fineweb", data_revision="any")
facts = {}

def failure(name, call):
    try:
        call()
    except hub.HubError as error:
        facts[name] = {"message": str(error), "transient": error.transient}

def resolve(name):
    return resolve_tokenizer(TokenizerConfig(tokenizer_name=name), text, cache)
"""


def ask(script: str, endpoint: str, tmp_path: Path, **environment: str) -> dict:
    """The dictionary `facts` that `script` fills."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{script}\nprint(json.dumps(facts))", str(tmp_path)],
        env=kept | ours | environment,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_refusals_say_what_to_do_and_whether_to_retry(tmp_path):
    def busy(method: str, path: str, headers: object) -> Fault | None:
        return Fault(status=503) if "busy" in path else None

    script = """
failure("gated", lambda: resolve(LLAMA_TOKENIZER))
failure("unknown", lambda: resolve("nobody/nothing"))
failure("busy", lambda: resolve("owner/busy"))
resolved = resolve("auto")
facts["auto"] = [resolved.tokenizer.tokenizer_name, resolved.reason]
"""
    with Hub([llama_tokenizer_repo(gated=True)]) as hub:
        hub.fault = busy
        facts = ask(script, hub.url, tmp_path)

    assert not facts["gated"]["transient"]
    assert "meta-llama/Llama-3.1-8B: gated" in facts["gated"]["message"]
    for remedy in ("hf auth login", "--tokenizer-name train", "--tokenizer-name FOLDER"):
        assert remedy in facts["gated"]["message"]
    assert not facts["unknown"]["transient"]
    assert "nobody/nothing: does not exist on the hub" in facts["unknown"]["message"]
    assert facts["busy"]["transient"]
    assert "503" in facts["busy"]["message"]
    name, reason = facts["auto"]
    assert name == "train" and "Llama-3.1-8B is not cached" in reason and "gated" in reason
    assert not (tmp_path / "tokenizers").exists()


def test_gated_tokenizer_is_fetched_once_with_a_token_and_then_needs_no_hub(tmp_path):
    script = """
resolved = resolve("auto")
facts["reason"] = resolved.reason
facts["tokenizer"] = fetch_tokenizer(resolved.tokenizer, text, cache).model_dump(mode="json")
facts["revision"] = resolved.tokenizer.tokenizer_revision
"""
    repo = llama_tokenizer_repo(gated=True)
    repo = replace(repo, files=repo.contents | {"tokenizer_code.py": b"raise SystemExit"})
    with Hub([repo]) as hub:
        first = ask(script, hub.url, tmp_path, HF_TOKEN=TOKEN)
        assert not any("safetensors" in path for _, path in hub.requests)
        assert not any(path.endswith(".py") for _, path in hub.requests), "no code is fetched"
        before = len(hub.requests)
        again = ask(script, hub.url, tmp_path)
        assert len(hub.requests) == before
        # a damaged one is no reason to do without the hub
        manifest = Path(first["tokenizer"]["path"]) / "manifest.json"
        manifest.write_text(manifest.read_text()[:-9])
        repaired = ask(script, hub.url, tmp_path, HF_TOKEN=TOKEN)
    assert first["revision"] == again["revision"] == repo.sha
    assert first["tokenizer"] == again["tokenizer"] == repaired["tokenizer"]
    assert "from the Hugging Face Hub" in repaired["reason"]
    assert "from the Hugging Face Hub" in first["reason"] and "cached" in again["reason"]
    folder = Path(first["tokenizer"]["path"])
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (folder / name).read_bytes() == repo.contents[name]
    assert not (folder / ".cache").exists()


def test_unreachable_hub_is_a_transient_failure_or_a_fallback(tmp_path):
    script = """
failure("tokenizer", lambda: resolve("owner/name"))
failure("fineweb", lambda: resolve_corpus(CorpusConfig(data_mode="fineweb")))
for name, mode in {"auto": "auto", "synthetic": "fineweb"}.items():
    resolved = resolve_corpus(CorpusConfig(data_mode=mode, allow_synthetic_fallback=True))
    facts[name] = [resolved.corpus.data_mode, resolved.reason]
"""
    facts = ask(script, "http://127.0.0.1:9", tmp_path)  # discard: nobody listens there
    for name in ("tokenizer", "fineweb"):
        assert facts[name]["transient"] and "cannot be reached" in facts[name]["message"]
    assert "--data-mode sample" in facts["fineweb"]["message"]
    assert "--allow-synthetic-fallback" in facts["fineweb"]["message"]
    assert facts["auto"][0] == "sample" and "cannot be reached" in facts["auto"][1]
    assert facts["synthetic"][0] == "synthetic" and "SYNTHETIC" in facts["synthetic"][1]


def test_fineweb_is_streamed_in_order_at_the_pinned_revision(tmp_path):
    script = """
settled, reason = resolve_corpus(CorpusConfig())
facts |= {"mode": settled.data_mode, "reason": reason, "revision": settled.data_revision}
facts["documents"] = list(read_documents(settled))
try:
    list(read_documents(settled.replace(fineweb_subset="sample-1T")))
except ValueError as error:
    facts["subset"] = str(error)
"""
    repo = fineweb_edu_repo(documents=60)
    with Hub([repo]) as hub:
        facts = ask(script, hub.url, tmp_path)
    files = [content for name, content in repo.contents.items() if name.startswith("sample/10BT")]
    rows = [row for file in files for row in pq.read_table(pa.BufferReader(file)).to_pylist()]
    assert facts["documents"] == [[row["id"], row["text"], row["url"]] for row in rows]
    assert len(rows) == 60
    assert (facts["mode"], facts["revision"]) == ("fineweb", repo.sha)
    assert "no subset sample-1T, only" in facts["subset"] and "sample-10BT" in facts["subset"]


def test_files_of_a_subset_are_those_that_the_datasets_library_reads(tmp_path):
    script = """
from datasets import load_dataset_builder
facts["theirs"] = {}
facts["ours"] = {}
for name, subset in {"HuggingFaceFW/fineweb-edu": "sample-10BT", "owner/plain": None}.items():
    revision = hub.dataset_revision(name)
    data = load_dataset_builder(name, subset, revision=revision).config.data_files["train"]
    facts["theirs"][name] = [path.partition(f"@{revision}/")[2] for path in data]
    files = hub.dataset_files(name, subset, revision=revision)
    facts["ours"][name] = [file.name for file in files]
"""
    names = ["test-0.jsonl", "train-10.jsonl", "train-9.jsonl", "more/train-1.jsonl", "LICENSE"]
    plain = Repo("dataset", "owner/plain", {name: b'{"text": "a"}' for name in names})
    with Hub([fineweb_edu_repo(documents=20, files=12), plain]) as hub:
        facts = ask(script, hub.url, tmp_path)
    assert facts["ours"] == facts["theirs"]
    assert len(facts["ours"]["HuggingFaceFW/fineweb-edu"]) == 12
    assert set(facts["ours"]["owner/plain"]) == {name for name in names if "train" in name}


def test_other_datasets_are_read_in_slices_that_request_only_their_own_bytes(tmp_path):
    script = """
slices.SLICE_BYTES = 20_000
for name in ("owner/rows", "owner/lines"):
    settled = resolve_corpus(CorpusConfig(data_mode="hub", dataset=name)).corpus
    files = list_files(settled)
    pieces, first = [], 0
    while first < len(files):
        planned, first = plan_slices(settled, files, first)
        pieces += planned
    facts[name] = {
        "revision": settled.data_revision,
        "texts": [
            [text for batch in read_slice(settled, piece, Tally()) for text in batch.texts]
            for piece in pieces
        ],
    }
"""
    texts = [f"{i} " + "word " * 200 for i in range(200)]
    table, sink = pa.table({"text": texts, "more": ["x" * 3000] * 200}), pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=20, compression="none", use_dictionary=False)
    parquet = sink.getvalue().to_pybytes()
    lines = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    repos = [
        Repo("dataset", "owner/rows", {"train-0.parquet": parquet}),
        Repo("dataset", "owner/lines", {"train-0.jsonl": lines}),
    ]
    sent = []
    with Hub(repos) as hub:
        hub.fault = lambda method, path, headers: sent.append((path, headers.get("Range")))
        facts = ask(script, hub.url, tmp_path)
    for repo in repos:
        found = facts[repo.name]
        assert found["revision"] == repo.sha
        assert len(found["texts"]) >= 10
        assert [text for piece in found["texts"] for text in piece] == texts
    ranges = [r.removeprefix("bytes=").split("-") for p, r in sent if "parquet" in p and r]
    asked = sum(int(last) - int(first) + 1 for first, last in ranges if first)
    # the text is a quarter of the file; the footer, read once, is 64 KiB of it
    assert asked < 0.4 * len(parquet)


def answered(status: int, code: str = "") -> Exception:
    error = RuntimeError("something about the hub")
    error.response = SimpleNamespace(status_code=status, headers={"X-Error-Code": code})
    return error


@pytest.mark.parametrize(
    ("error", "transient", "cause"),
    [
        (answered(401, "GatedRepo"), False, "gated"),
        (answered(403), False, "gated"),
        (answered(401, "RepoNotFound"), False, "does not exist"),
        (answered(404, "RevisionNotFound"), False, "not found on the hub (RevisionNotFound)"),
        (answered(429), True, "slow down"),
        (answered(500), True, "500"),
        (answered(503), True, "503"),
        (answered(418), False, "418"),
        (ConnectionRefusedError("refused"), True, "cannot be reached (refused)"),
        (HTTPException("IncompleteRead"), True, "reading from the hub failed"),
    ],
)
def test_failure_is_explained_by_its_status_even_behind_other_errors(error, transient, cause):
    plain = hub_errors.explain(error, "owner/name")
    try:
        try:
            raise error
        except type(error):
            raise FileNotFoundError("what a library makes of it")  # noqa: B904, as they do
    except FileNotFoundError as hiding:
        hidden = hub_errors.explain(hiding, "owner/name")
    assert plain.transient == transient and cause in plain.cause
    assert str(plain).startswith("owner/name: ")
    if hasattr(error, "response"):
        assert (hidden.transient, hidden.cause) == (plain.transient, plain.cause)


def test_remedies_are_added_to_the_message_and_change_nothing_else():
    error = hubs.HubError("owner/name", "is busy", transient=True)
    better = error.with_remedies("wait", "ask")
    assert (better.subject, better.cause, better.transient) == ("owner/name", "is busy", True)
    assert str(better) == "owner/name: is busy. What can be done:\n  - wait\n  - ask"


def test_failure_keeps_its_facts_across_processes():
    error = hubs.HubError("a/b", "busy", transient=True, remedies=("wait",), retry_after=3.0)
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) and "wait" in str(back)
    assert (back.transient, back.retry_after) == (True, 3.0)

"""All requests to the hub, with a hub on loopback that fails in many ways; see `faults`."""

import io
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import (
    CALM,
    CONTENT,
    DATASET,
    FILE,
    NOBODY,
    READ,
    REPO,
    TROUBLES,
    Trouble,
    VirtualTime,
    answers,
    asking,
    meet,
)
from hub import TOKEN, Fault, Hub, Repo, fineweb_edu_repo, llama_tokenizer_repo

from zeroflow.data import hub as hubs
from zeroflow.data import hub_requests
from zeroflow.data.hub import HubError, HubFile, Patience

TWICE = replace(CALM, tries=2)
IMPATIENT = replace(TWICE, stall_seconds=0.25)
"""For a hub that says nothing at all."""

LLAMA = "meta-llama/Llama-3.1-8B"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


@pytest.fixture(scope="module")
def tokenizer() -> Repo:
    return llama_tokenizer_repo(gated=False)


@pytest.fixture(scope="module")
def fineweb_edu() -> Repo:
    return fineweb_edu_repo(documents=60)


@pytest.fixture
def hub(tokenizer: Repo, fineweb_edu: Repo) -> Iterator[Hub]:
    with Hub([REPO, fineweb_edu, tokenizer]) as hub, asking(hub.url):
        yield hub


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    """Seconds that requests have waited between their tries."""
    clock = VirtualTime()
    monkeypatch.setattr(hub_requests, "time", clock)
    return clock


def always(fault: Fault) -> Callable[[str, str, Message], Fault]:
    return lambda method, path, headers: fault


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_read_succeeds_or_explains_the_failure_in_time(
    trouble: Trouble, request: pytest.FixtureRequest
):
    clock = VirtualTime() if trouble.is_about_time else request.getfixturevalue("clock")
    outcome = meet(trouble)
    if trouble.says:
        assert outcome.error is not None
        assert trouble.says in outcome.error.cause
        assert outcome.error.transient == trouble.transient
        assert f"{DATASET}/{FILE}, bytes 100,000 to 200,000" in str(outcome.error)
        assert " in " in outcome.error.cause and outcome.error.cause.endswith(" s)")
        if not trouble.transient:
            assert outcome.requests == 1
    else:
        assert outcome.error is None
        assert outcome.data == CONTENT[READ]
    assert clock.now < trouble.patience.seconds


def of_tokenizer(file: str) -> bool:
    return file.startswith("tokenizer") or file.endswith(".model")


OPERATIONS: dict[str, Callable[[Path, Patience], object]] = {
    "dataset_revision": lambda _, patience: hubs.dataset_revision(FINEWEB_EDU, patience=patience),
    "model_revision": lambda _, patience: hubs.model_revision(
        LLAMA, None, probe="tokenizer.json", patience=patience
    ),
    "dataset_files": lambda _, patience: hubs.dataset_files(
        FINEWEB_EDU, "sample-10BT", revision="main", patience=patience
    ),
    "download": lambda folder, patience: hubs.download(
        LLAMA, None, of_tokenizer, folder, patience=patience
    ),
}
REFUSALS = {
    "gated": (answers(401, X_Error_Code="GatedRepo"), "gated", False),
    "forbidden": (answers(403), "gated", False),
    "missing": (answers(404), "not found", False),
    "busy": (answers(503), "answers 503", True),
    "limited": (answers(429, Retry_After="600"), "asks to wait 600 s", True),
    "stalled": (Fault(stall_after_bytes=0), "no ", True),
    "broken": (Fault(drop_after_bytes=1), "was lost", True),
    "no JSON": (Fault(truncate_to_bytes=1), "the answer is not JSON", True),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_every_question_ends_in_time_with_the_answer_of_the_hub(
    operation: str, refusal: str, hub: Hub, tmp_path: Path, clock: VirtualTime
):
    fault, says, transient = REFUSALS[refusal]
    hub.fault = always(fault)
    with pytest.raises(HubError) as failed:
        OPERATIONS[operation](tmp_path, IMPATIENT if refusal == "stalled" else TWICE)
    assert says in failed.value.cause
    assert failed.value.transient == transient
    assert len(hub.requests) == (2 if transient and refusal != "limited" else 1)
    assert clock.now < TWICE.seconds


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_question_is_repeated_after_failed_answers(
    operation: str, hub: Hub, tmp_path: Path, clock: VirtualTime
):
    seen: dict[str, int] = {}

    def first_fails(method: str, path: str, headers: Message) -> Fault | None:
        seen[path] = seen.get(path, 0) + 1
        return answers(503) if seen[path] == 1 else None

    hub.fault = first_fails
    OPERATIONS[operation](tmp_path, TWICE)
    assert min(seen.values()) > 1


def test_question_fails_within_seconds_without_an_answer(clock: VirtualTime):
    with asking(NOBODY), pytest.raises(HubError) as failed:
        hubs.dataset_revision(DATASET)
    assert failed.value.cause.startswith("the hub cannot be reached (127.0.0.1:9 refuses")
    assert f"({hubs.QUESTION.tries} tries in " in failed.value.cause
    assert clock.now < hubs.QUESTION.seconds


def test_answer_that_never_begins_is_cancelled(hub: Hub):
    hub.fault = lambda method, path, headers: time.sleep(60)
    once = replace(IMPATIENT, tries=1)
    with pytest.raises(HubError, match=r"no answer came within|no byte came from"):
        hubs.dataset_revision(DATASET, patience=once)


def test_offline_mode_is_reported_and_not_retried(hub: Hub):
    with asking(hub.url) as patch:
        patch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
        with pytest.raises(HubError, match=r"HF_HUB_OFFLINE .*\(1 try") as failed:
            hubs.dataset_revision(DATASET)
    assert not failed.value.transient and not hub.requests


def test_malformed_token_is_refused_without_being_shown(hub: Hub):
    for token in ("hf_\x00secret", "hf_sécret"):
        with asking(hub.url) as patch:
            patch.setattr("huggingface_hub.get_token", lambda token=token: token)
            with pytest.raises(HubError, match="HF_TOKEN") as failed:
                hubs.dataset_revision(FINEWEB_EDU, patience=TWICE)
        assert not failed.value.transient
        assert "cret" not in str(failed.value)


def test_token_is_sent_to_the_hub_but_not_after_a_redirect(hub: Hub):
    tokens: list[tuple[str, str | None]] = []

    def keep(method: str, path: str, headers: Message) -> Fault:
        tokens.append(("storage", headers["Authorization"]))
        # a storage has a name of its own for contents, this one for every answer
        return Fault(headers={"ETag": f"{len(tokens)}", "X-Linked-Etag": ""})

    def send_on(method: str, path: str, headers: Message) -> Fault:
        tokens.append(("hub", headers["Authorization"]))
        place = storage.url.replace("127.0.0.1", "localhost") + path
        return Fault(302, {"Location": place, "X-Linked-Etag": '"the hub\'s"'})

    with Hub([REPO]) as storage, asking(hub.url) as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        storage.fault, hub.fault = keep, send_on
        file = hubs.open_file(DATASET, HubFile(FILE, len(CONTENT)), revision=REPO.sha)
        for place in (200_000, 100_000):
            file.seek(place)
            assert file.read(50_000) == CONTENT[place : place + 50_000]
        assert tokens == 2 * [("hub", f"Bearer {TOKEN}"), ("storage", None)]

        storage.fault = always(answers(403))
        file.seek(0)
        with pytest.raises(HubError, match=r"localhost:\d+, where the hub keeps .* 403"):
            file.read(5)


def test_unreachable_storage_is_named(hub: Hub):
    hub.fault = always(Fault(302, {"Location": f"{NOBODY}/file"}))
    file = hubs.open_file(DATASET, HubFile(FILE, 9), revision=REPO.sha, patience=TWICE)
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 refuses connections"):
        file.read(9)


def test_whole_file_instead_of_a_range_is_not_read_far(monkeypatch):
    monkeypatch.setattr(hubs, "SKIP_BYTES", 50_000)
    outcome = meet(Trouble("far", (Fault(ignore_range=True),)))
    assert outcome.error is not None and not outcome.error.transient
    assert "answers a range with the whole file" in outcome.error.cause


# Reading


def test_reads_return_the_content_from_any_position(hub: Hub):
    rng = random.Random(1)
    ours = io.BytesIO(CONTENT)
    with hubs.open_file(DATASET, HubFile(FILE, len(CONTENT)), revision=REPO.sha) as file:
        for _ in range(200):
            match rng.randrange(4):
                case 0:
                    place = rng.randrange(-5, 5), io.SEEK_CUR
                    place = place if ours.tell() >= 5 else (0, io.SEEK_SET)
                case 1:
                    place = rng.randrange(len(CONTENT) + 9), io.SEEK_SET
                case 2:
                    place = -rng.randrange(len(CONTENT)), io.SEEK_END
                case _:
                    place = 0, io.SEEK_CUR
            assert file.seek(*place) == ours.seek(*place)
            count = rng.choice([0, 1, 7, 1_000, 70_000, -1])
            assert file.read(count) == ours.read(count)
            assert file.tell() == min(ours.tell(), max(file.tell(), len(CONTENT)))
    with pytest.raises(ValueError, match="is closed"):
        file.read(1)


GROUPS = [[random.Random(n).randbytes(750_000).hex() for n in (0, 1)] for _ in range(3)]
"""Texts of three row groups, each group larger than what is read ahead."""


def parquet_hub() -> Hub:
    texts = [text for group in GROUPS for text in group]
    table = pa.table({"id": [*"abcdef"], "text": texts, "other": texts})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2, compression="none", use_dictionary=False)
    return Hub([Repo("dataset", DATASET, {"a.parquet": out.getvalue()})])


def open_parquet(hub: Hub, patience: Patience = TWICE) -> pq.ParquetFile:
    size = len(hub.repos["dataset", DATASET].contents["a.parquet"])
    file = HubFile("a.parquet", size)
    remote = hubs.open_file(DATASET, file, revision="main", patience=patience)
    return pq.ParquetFile(remote, pre_buffer=True)


def test_text_column_of_a_row_group_is_one_request_for_its_bytes():
    asked: list[int] = []

    def note(method: str, path: str, headers: Message) -> None:
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        asked.append(int(last) + 1 - int(first))

    with parquet_hub() as hub, asking(hub.url):
        hub.fault = note
        with open_parquet(hub, hubs.READING) as file:  # which asks once, however slow the machine
            assert len(asked) == 1, "the footer"
            for number in (1, 2):
                group = file.read_row_group(number, columns=["text"])
                assert group.column("text").to_pylist() == GROUPS[number]
                size = file.metadata.row_group(number).column(1).total_compressed_size
                assert asked[1:] == [size] * number


def test_failure_passes_the_parquet_reader_unchanged():
    with parquet_hub() as hub, asking(hub.url), open_parquet(hub) as file:
        hub.fault = always(answers(503))
        with pytest.raises(HubError, match="the hub answers 503") as failed:
            next(file.iter_batches(columns=["text"]))
    assert failed.value.transient


def test_lines_are_read_from_an_offset_in_few_requests():
    lines = [b"%d %s\n" % (number, b"x" * (number % 300)) for number in range(10_000)]
    content = b"".join(lines)
    offset = len(b"".join(lines[:500]))
    with Hub([Repo("dataset", DATASET, {"a.jsonl": content})]) as hub, asking(hub.url):
        file = hubs.open_file(DATASET, HubFile("a.jsonl", len(content)), revision="main")
        file.seek(offset)
        assert list(file) == lines[500:]
        assert file.tell() == len(content)
        few = 2 + len(content) // hubs.READ_AHEAD_BYTES
        assert len(hub.requests) <= few
        file.seek(offset)
        text = io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8")
        assert text.readline().encode() == lines[500]


# Files of a subset


def test_files_of_a_subset_are_listed_over_several_pages_with_their_sizes(hub: Hub):
    hub.page_entries = 2
    repo = hub.repos["dataset", FINEWEB_EDU]
    files = hubs.dataset_files(FINEWEB_EDU, "sample-10BT", revision=repo.sha)
    names = [f"sample/10BT/00{number}_00000.parquet" for number in (0, 1)]
    assert files == [HubFile(name, len(repo.contents[name])) for name in names]
    path = f"datasets/{FINEWEB_EDU}"
    asked = {path for _, path in hub.requests}  # only by us, nothing by the library
    assert asked == {f"/api/{path}/tree/{repo.sha}", f"/{path}/resolve/{repo.sha}/README.md"}
    (crawl,) = hubs.dataset_files(FINEWEB_EDU, None, revision=repo.sha)
    assert crawl.name.startswith("data/CC-MAIN-2024-10/")


def test_missing_subset_is_refused_with_the_existing_ones(hub: Hub):
    with pytest.raises(ValueError, match="has no subset sample-1T, only default, sample-10BT"):
        hubs.dataset_files(FINEWEB_EDU, "sample-1T", revision="main")


@pytest.mark.parametrize(
    ("readme", "subset", "says"),
    [
        ("", None, "has no train split, only test"),
        ("a: test.jsonl\nb: test.jsonl", None, "has several subsets, a, b: set --fineweb-subset"),
        ("a: none.jsonl", "a", f"{DATASET}: its files do not form a dataset: .*none.jsonl"),
    ],
)
def test_dataset_with_several_subsets_and_no_default_is_refused(
    readme: str, subset: str | None, says: str
):
    configs = "".join(
        f"- config_name: {name}\n  data_files: {path}\n"
        for name, path in (line.split(": ") for line in readme.splitlines())
    )
    head = f"---\nconfigs:\n{configs}---\n" if configs else ""
    files = {"README.md": head.encode(), "test.jsonl": b'{"text": ""}'}
    with (
        Hub([Repo("dataset", DATASET, files)]) as hub,
        asking(hub.url),
        pytest.raises(ValueError, match=says),
    ):
        hubs.dataset_files(DATASET, subset, revision="main")


def test_list_that_names_a_file_outside_the_repository_is_refused():
    with (
        Hub([Repo("dataset", DATASET, {"../a.jsonl": b"{}"})]) as hub,
        asking(hub.url),
        pytest.raises(HubError, match="outside the repository") as failed,
    ):
        hubs.dataset_files(DATASET, None, revision="main")
    assert not failed.value.transient


def test_download_fetches_only_the_matching_files(hub: Hub, tokenizer: Repo, tmp_path: Path):
    hub.fault = lambda method, path, headers: (
        Fault(drop_after_bytes=5_000) if "/resolve/" in path else None
    )
    hubs.download(LLAMA, tokenizer.sha, of_tokenizer, tmp_path, patience=TWICE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: tokenizer.contents[name] for name in ("tokenizer.json", "tokenizer_config.json")
    }

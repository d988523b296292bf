"""The Hugging Face Hub: what we ask of it, and its failures in one sentence each."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""How long the hub may take for a question about a repository."""

_RETRIES = 2


class HubError(RuntimeError):
    """The hub refused, or could not be reached."""

    def __init__(
        self, subject: str, cause: str, *, transient: bool, remedies: tuple[str, ...] = ()
    ) -> None:
        self.subject, self.cause, self.transient = subject, cause, transient
        """`transient`: the same call may succeed later."""
        ways = "".join(f"\n  - {remedy}" for remedy in remedies)
        super().__init__(f"{subject}: {cause}" + (f". What can be done:{ways}" if ways else ""))

    def with_remedies(self, *remedies: str) -> Self:
        return type(self)(self.subject, self.cause, transient=self.transient, remedies=remedies)


def dataset_revision(name: str) -> str:
    """The commit that a dataset's main branch is at.

    Raises:
        HubError: within a few seconds.
    """
    from huggingface_hub import HfApi

    try:
        return _commit(HfApi().dataset_info(name, timeout=ANSWER_SECONDS).sha)
    except Exception as error:
        raise explain(error, name) from error


def model_revision(name: str, revision: str | None, *, probe: str) -> str:
    """The commit of a model repository, once it is known that it gives us its file `probe`.

    Raises:
        HubError: within a few seconds.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        commit = _commit(HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS).sha)
        with suppress(EntryNotFoundError):  # it gives its files, only has none of this name
            get_hf_file_metadata(hf_hub_url(name, probe, revision=commit), timeout=ANSWER_SECONDS)
        return commit
    except Exception as error:
        raise explain(error, name) from error


def download(name: str, revision: str | None, patterns: list[str], folder: Path) -> None:
    """Fetch the files of a model repository that match `patterns` into `folder`.

    Raises:
        HubError: the hub refused or failed.
    """
    import shutil

    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, allow_patterns=patterns, local_dir=folder)
    except Exception as error:
        raise explain(error, name) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's bookkeeping


def stream(
    name: str, subset: str, *, revision: str, columns: list[str], rows: int
) -> Iterator[pa.Table]:
    """Tables of `rows` rows of a dataset's train split, read as they are needed.

    Raises:
        HubError: the hub refused or failed, at first or in mid-stream.
        ValueError: the dataset has no such subset.
    """
    import datasets
    from datasets import get_dataset_config_names, load_dataset

    # Its default of 20 tries of half a minute each looks like a stream that hangs
    datasets.config.STREAMING_READ_MAX_RETRIES = _RETRIES
    datasets.config.STREAMING_OPEN_MAX_RETRIES = _RETRIES
    try:
        if subset not in (subsets := get_dataset_config_names(name, revision=revision)):
            known = ", ".join(subsets[:8]) + (", ..." if len(subsets) > 8 else "")
            raise ValueError(f"{name} has no subset {subset}, only {known}: set --fineweb-subset")
        dataset = load_dataset(name, subset, split="train", streaming=True, revision=revision)
        selected = dataset.select_columns(columns).with_format("arrow")
        yield from selected.iter(batch_size=rows)
    except (ValueError, GeneratorExit):
        raise
    except Exception as error:
        raise explain(error, name) from error


def explain(error: BaseException, subject: str) -> HubError:
    """What a failure of the hub's libraries means, from status and cause rather than class.

    The classes change with the libraries' versions, and some hide a 503 behind FileNotFoundError.
    """
    for cause in _chain(error):
        response: Any = getattr(cause, "response", None)
        if hasattr(response, "status_code"):
            code = response.headers.get("X-Error-Code", "")
            return _from_status(int(response.status_code), code, subject)
    for cause in _chain(error):
        if isinstance(cause, OSError | TimeoutError) or "timeout" in type(cause).__name__.lower():
            return HubError(subject, f"the hub cannot be reached ({cause})", transient=True)
    text = " ".join(str(error).split())[:300]
    unreachable = any("connect" in type(c).__name__.lower() for c in _chain(error))
    cause_text = "the hub cannot be reached" if unreachable else "reading from the hub failed"
    return HubError(subject, f"{cause_text} ({type(error).__name__}: {text})", transient=True)


def _from_status(status: int, code: str, subject: str) -> HubError:
    if code == "GatedRepo" or status == 403:
        return HubError(
            subject,
            f"gated: the hub asks for an accepted licence and a login ({status})",
            transient=False,
        )
    if status == 401:
        return HubError(subject, "unknown to the hub, or private (401)", transient=False)
    if status == 404:
        return HubError(subject, f"not found on the hub ({code or 404})", transient=False)
    if status == 429:
        return HubError(subject, "the hub asks to slow down (429)", transient=True)
    return HubError(subject, f"the hub answers {status}", transient=status >= 500)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _commit(sha: str | None) -> str:
    assert sha, "the hub names the commit of every repository"
    return sha

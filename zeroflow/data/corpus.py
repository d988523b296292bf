"""The corpus of a run: its settings, and how they are resolved.

`resolve_corpus` chooses a mode for `auto` and pins the revision, so that the settings determine the
text. A resolved corpus is a list of files from one source, or synthetic token ids.
"""

import glob
import re
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from zeroflow.config import Config, WholeNonNegative, flag
from zeroflow.data import hub
from zeroflow.data.formats import registry
from zeroflow.data.formats.file import CorpusFile, DocumentFile
from zeroflow.data.sources.hub_dataset import HubDataset
from zeroflow.data.sources.local_files import LocalFiles, StandardLibrary
from zeroflow.data.sources.source import Source

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

CorpusIdentity = dict[str, str | int | bool | None]
"""All settings that the documents of a corpus depend on, by readable names. The names depend on the
source."""


class CorpusConfig(Config):
    """Source of the text."""

    data_mode: Literal["auto", "fineweb", "hub", "files", "sample", "synthetic"] = "auto"
    """fineweb: FineWeb-Edu from the Hugging Face Hub. hub: another dataset there, see --dataset.
    files: your own, see --data-path. sample: the source files of Python's standard library, which
    every machine has. synthetic: generated token ids. auto: fineweb if the hub answers within a few
    seconds, otherwise sample."""

    fineweb_subset: str = "sample-10BT"
    """Subset of FineWeb-Edu, such as sample-10BT, sample-100BT or CC-MAIN-2024-10."""

    dataset: str | None = None
    """Name of a dataset on the hub, for --data-mode hub."""

    dataset_config: str | None = None
    """Subset of that dataset. Default: the dataset's default."""

    data_path: tuple[str, ...] = Field((), description=f"Files or globs: {registry.described()}.")

    validation_path: tuple[str, ...] = ()
    """Files or globs of your own text for validation, instead of a fraction of the corpus. They and
    their copies are left out of training if --data-path names them too."""

    text_column: str = "text"
    """Field of .jsonl lines or column of .parquet files that contains the text."""

    bad_lines_limit: WholeNonNegative = 0
    """Number of .jsonl lines without valid JSON or text, and of .parquet rows that are not UTF-8,
    that may be skipped; they are counted and reported. One more ends the run."""

    deduplicate: bool = False
    """Leave out documents whose text is byte for byte the same as that of an earlier document."""

    allow_synthetic_fallback: bool = False
    """Fall back from fineweb to synthetic, with a warning, when FineWeb-Edu cannot be reached; auto
    falls back to the sample."""

    data_revision: str | None = None
    """Commit of the dataset on the hub, or digest of the files; determined once, then recorded."""

    validation_revision: str | None = None
    """Digest of the files of --validation-path; determined once, then recorded."""

    read_by: ClassVar[dict[str, tuple[str, ...]]] = {
        "fineweb_subset": ("auto", "fineweb"),
        "validation_path": ("auto", "fineweb", "hub", "files", "sample"),
        "text_column": ("auto", "fineweb", "hub", "files"),
        "bad_lines_limit": ("hub", "files"),
        "deduplicate": ("auto", "fineweb", "hub", "files", "sample"),
        "allow_synthetic_fallback": ("auto", "fineweb"),
    }
    """Modes that read a setting. With another mode, the setting is refused, as it has no effect."""

    free: ClassVar[tuple[str, ...]] = (
        "data_path",
        "validation_path",
        "allow_synthetic_fallback",
        "bad_lines_limit",
    )
    """Settings that may change when a run is resumed, because the revision shows whether the text
    is the same."""

    files_flag: ClassVar[str] = "--data-path"
    """The flag that names the files, in error messages."""

    @model_validator(mode="after")
    def _settings_belong_to_the_mode(self) -> Self:
        if self.data_mode == "files" and not self.data_path:
            raise ValueError("--data-mode files needs --data-path: name files or globs")
        if self.data_path and self.data_mode != "files":
            raise ValueError(
                f"--data-path is used only with --data-mode files, not with {self.data_mode}: "
                "use --data-mode files, or drop it"
            )
        if self.data_mode == "hub" and not self.dataset:
            raise ValueError("--data-mode hub needs --dataset: name one, as owner/name")
        if (self.dataset or self.dataset_config) and self.data_mode != "hub":
            raise ValueError(
                f"{'--dataset' if self.dataset else '--dataset-config'} is used only with "
                f"--data-mode hub, not with {self.data_mode}: use --data-mode hub, or drop it"
            )
        return self

    @property
    def name(self) -> str:
        """Short readable name for directories, tags and reports."""
        if self.data_mode == "fineweb":
            return _as_name(f"fineweb-edu-{self.fineweb_subset}")
        if self.data_mode == "hub":
            parts = (str(self.dataset).rsplit("/", 1)[-1], self.dataset_config)
            return _as_name("-".join(part for part in parts if part).lower())
        return self.data_mode

    @property
    def is_text(self) -> bool:
        """False for synthetic data, which is generated as token ids."""
        return self.data_mode != "synthetic"

    @property
    def source(self) -> Source:
        """The source of a text corpus's files."""
        match self.data_mode:
            case "auto" | "fineweb":
                return HubDataset(FINEWEB_EDU, self.fineweb_subset)
            case "hub":
                return HubDataset(str(self.dataset), self.dataset_config)
            case "files":
                return LocalFiles(self.data_path, self.files_flag, self._apart)
            case "sample":
                return StandardLibrary(self._apart)
            case "synthetic":
                raise ValueError("synthetic data has no files")

    @property
    def _apart(self) -> LocalFiles | None:
        """The files for validation, which are left out of training."""
        if not self.validation_path:
            return None
        return LocalFiles(self.validation_path, _ValidationCorpus.files_flag)

    @property
    def anywhere(self) -> Self:
        """A copy with absolute paths."""
        paths = {
            name: tuple(map(absolute, getattr(self, name)))
            for name in ("data_path", "validation_path")
        }
        return self.model_copy(update={name: path for name, path in paths.items() if path})

    @property
    def validation(self) -> "CorpusConfig | None":
        """The corpus of `validation_path`; None if a fraction of this corpus is held out."""
        if not self.validation_path:
            return None
        return _ValidationCorpus(
            data_mode="files",
            data_path=self.validation_path,
            data_revision=self.validation_revision,
            text_column=self.text_column,
            bad_lines_limit=self.bad_lines_limit,
            deduplicate=self.deduplicate,
        )

    def refuse_unread_settings(self) -> None:
        """Refuse settings that the chosen mode does not read.

        Raises:
            ValueError: such a setting is not at its default.
        """
        for name, modes in self.read_by.items():
            default = type(self).model_fields[name].default
            if self.data_mode not in modes and getattr(self, name) != default:
                raise ValueError(
                    f"{flag(name)} has no effect with --data-mode {self.data_mode}, "
                    f"only with {', '.join(modes)}: drop one of them"
                )


class _ValidationCorpus(CorpusConfig):
    """The files of `validation_path`, as a corpus."""

    files_flag: ClassVar[str] = "--validation-path"


def absolute(pattern: str) -> str:
    """Make a path or glob absolute; special characters of the working directory are escaped."""
    path = Path(pattern).expanduser()
    if path.is_absolute() or path.exists():
        return str(path.absolute())
    return str(Path(glob.escape(str(Path.cwd())), path))


_LONGEST_NAME = 70
"""Maximum number of characters: the name of a run contains it, and has at most 100 characters."""


def _as_name(text: str) -> str:
    """Replace characters that may not be in the name of a run: `en (v2)` becomes `en-v2`."""
    words = re.split(r"[^A-Za-z0-9._-]+", text)
    return "-".join(word for word in words if word)[:_LONGEST_NAME].strip("-")


class ResolvedCorpus(NamedTuple):
    corpus: CorpusConfig
    reason: str
    """Why this corpus was chosen."""


def resolve_corpus(corpus: CorpusConfig, known: Path | None = None) -> ResolvedCorpus:
    """Choose a mode for `auto`, and pin the revision.

    Args:
        known: folder for digests of local files; None to read them all.

    Raises:
        hub.HubError: the mode needs the hub, which refused or could not be reached.
        ValueError: there are no such files, or they differ from `data_revision`.
    """
    if not corpus.is_text:
        return ResolvedCorpus(corpus, "asked for")
    try:
        wanted = corpus.replace(data_mode="fineweb") if corpus.data_mode == "auto" else corpus
        pinned = _pin(wanted, known)
    except hub.HubError as error:
        return _fall_back(corpus, error, known)
    return ResolvedCorpus(pinned, "the hub answers" if corpus.data_mode == "auto" else "asked for")


def _pin(corpus: CorpusConfig, known: Path | None) -> CorpusConfig:
    if validation := corpus.validation:  # local files first, before a request to the hub
        pinned = validation.source.pin(validation.data_revision, known)
        corpus = corpus.replace(validation_revision=pinned)
    return corpus.replace(data_revision=corpus.source.pin(corpus.data_revision, known))


def _fall_back(corpus: CorpusConfig, error: hub.HubError, known: Path | None) -> ResolvedCorpus:
    """Return the corpus to use without the hub.

    Raises:
        hub.HubError: `error` with remedies, if no fallback is allowed.
    """
    if corpus.data_mode == "auto":
        sample = CorpusConfig(
            data_mode="sample",
            deduplicate=corpus.deduplicate,
            validation_path=corpus.validation_path,
            validation_revision=corpus.validation_revision,
        )
        return ResolvedCorpus(_pin(sample, known), f"instead of FineWeb-Edu: {error.cause}")
    if corpus.allow_synthetic_fallback:
        synthetic = CorpusConfig(data_mode="synthetic", allow_synthetic_fallback=True)
        return ResolvedCorpus(synthetic, f"SYNTHETIC FALLBACK, no real text: {error}")
    remedies = ["`hf auth login` if it asks for an account"]
    instead = ", without --dataset," if corpus.data_mode == "hub" else ""
    remedies += [f"`--data-mode sample`{instead} to work without the hub"]
    if corpus.data_mode == "fineweb":
        remedies += ["`--allow-synthetic-fallback` to train on synthetic data instead"]
    raise error.with_remedies(*remedies) from error


def corpus_identity(corpus: CorpusConfig) -> CorpusIdentity:
    """All settings that the documents of a resolved text corpus depend on."""
    source = corpus.source
    identity: CorpusIdentity = {"source": corpus.data_mode, "revision": corpus.data_revision}
    identity |= source.identity()
    if source.has_columns:
        identity |= {"text_column": corpus.text_column}
    return identity


def list_files(corpus: CorpusConfig) -> list[CorpusFile]:
    """The files of a resolved text corpus, in the order in which they are read.

    Raises:
        hub.HubError: the hub refused or failed.
        ValueError: the dataset has no such subset, or files of an unknown format.
    """
    assert corpus.data_revision, "resolve_corpus() pins the revision"
    source = corpus.source
    files = source.files(corpus.data_revision)
    for file in files:
        source.format_of(file.name)
    return files


def document_file(corpus: CorpusConfig, file: CorpusFile) -> DocumentFile:
    """A file of a resolved text corpus, with the settings for reading it."""
    assert corpus.data_revision, "resolve_corpus() pins the revision"
    return DocumentFile(
        corpus.source, file, corpus.data_revision, corpus.text_column, corpus.bad_lines_limit
    )

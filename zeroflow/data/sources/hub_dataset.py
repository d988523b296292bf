"""Datasets on the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from zeroflow.data import hub
from zeroflow.data.formats.file import CorpusFile
from zeroflow.data.hub import HubFile
from zeroflow.data.sources.source import Source


@dataclass(frozen=True)
class HubDataset(Source):
    """The train split of a dataset's subset."""

    dataset: str
    """owner/name"""

    subset: str | None
    """None for the dataset's default subset."""

    def pin(self, revision: str | None, known: Path | None = None) -> str:
        revision = revision or "main"
        if re.fullmatch("[0-9a-f]{40}", revision):
            return revision  # a commit never changes, so no request is needed
        return hub.dataset_revision(self.dataset, revision)

    def files(self, revision: str) -> list[CorpusFile]:
        found = hub.dataset_files(self.dataset, self.subset, revision=revision)
        return [CorpusFile(name=file.name, size=file.size) for file in found]

    def open(self, file: CorpusFile, revision: str) -> IO[bytes]:
        remote = HubFile(name=file.name, size=file.size)
        return cast(IO[bytes], hub.open_file(self.dataset, remote, revision=revision))

    def place(self, file: CorpusFile) -> str:
        return f"{self.dataset}, {file.name}"

    def require_unchanged(self, file: CorpusFile) -> None:
        """Nothing to check: a commit never changes, and `hub` compares ETags while it reads."""

    def identity(self) -> dict[str, str | None]:
        return {"dataset": self.dataset, "subset": self.subset}

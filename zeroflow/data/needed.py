"""The rows that a run needs, and the parts that it lacks."""

import math

from zeroflow.data.corpus import CorpusConfig
from zeroflow.data.part_counts import PartCounts
from zeroflow.data.shards import ShardConfig, part_tokens
from zeroflow.data.tokenizer import Tokenizer


class Needed:
    """The rows that a run needs, compared with those that exist in parts 0, 1, ..."""

    def __init__(self, config: ShardConfig, corpus: CorpusConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._part_tokens = part_tokens(corpus, tokenizer.vocab_size)
        self.train_rows = config.train_rows
        self.validation_rows = config.validation_rows if corpus.validation is None else 0
        """Validation rows to hold out from the corpus; 0 if the validation text is separate."""

        self.counts = PartCounts.none()
        """Counts of the existing parts before the first missing one."""

    @property
    def rows(self) -> tuple[int, int]:
        """Training and validation rows of the parts so far."""
        return self.counts.total("train_rows"), self.counts.total("validation_rows")

    @property
    def is_met(self) -> bool:
        train, validation = self.rows
        return train >= self.train_rows and validation >= self.validation_rows

    @property
    def missing_parts(self) -> int:
        """Number of parts that are still needed, estimated from the existing ones."""
        if parts := len(self.counts):
            train, validation = (rows / parts for rows in self.rows)
        else:
            rows = self._part_tokens / self._config.layout.row_tokens
            share = self._config.validation_fraction
            train, validation = rows * (1 - share), rows * share
        total = max(self.train_rows / max(train, 1), self.validation_rows / max(validation, 1))
        return max(1, math.ceil(max(total, parts)) - parts)

    def progress(self, built: int, seconds: float) -> tuple[float, str]:
        """Return the fraction of the rows that exist, and a line with the estimated time left.

        Args:
            built: number of parts that were built in `seconds`.
        """
        train, validation = self.rows
        missing = 0 if self.is_met else self.missing_parts
        share = min(1.0, train / self.train_rows, (validation + 1) / (self.validation_rows + 1))
        left = f"  ETA {missing * seconds / built:,.0f} s" if missing and built else ""
        text = f"part {len(self.counts)}  {train:,} of {self.train_rows:,} rows{left}"
        return share, text

"""Packs and writes the documents of one split of a part."""

from pathlib import Path

import numpy as np

from zeroflow.data import packing
from zeroflow.data.document_table import DocumentTable
from zeroflow.data.file_writer import FileWriter
from zeroflow.data.row_files import RowFiles
from zeroflow.data.shards import Layout, Split, SplitCounts
from zeroflow.data.token_batches import TokenBatch, concatenate

WINDOW_DOCUMENTS = 2000

WINDOW_TOKENS = (2**20, 2**21)
"""A window of documents is packed when it has `WINDOW_DOCUMENTS` documents and the first number of
tokens, or when it has the second number of tokens. Best fit needs many documents to choose from,
and with these limits a window of books or of tweets fits in memory."""


class SplitWriter:
    """Packs documents window by window, and writes the rows and the document table."""

    def __init__(
        self,
        part: Path,
        split: Split,
        layout: Layout,
        *,
        end_of_text: int,
        table: DocumentTable,
        writer: FileWriter,
    ) -> None:
        self._split, self._layout, self._end_of_text = split, layout, end_of_text
        self._table = table
        self._pack = packing.PACKINGS[layout.packing]
        # Best fit fills rows almost completely, so a window rarely needs rows of twice its tokens
        spare_rows = 2 * WINDOW_TOKENS[1] // layout.row_tokens
        self._rows = RowFiles(part, split, layout, writer, spare_rows=spare_rows)
        self._window: list[TokenBatch] = []
        self._documents_held = self._tokens_held = 0
        self._counts = SplitCounts()

    def add(self, batch: TokenBatch) -> None:
        lengths = batch.documents.lengths
        if not len(lengths):
            return
        self._window.append(batch)
        self._documents_held += len(lengths)
        self._tokens_held += int(lengths.sum())
        enough, many = WINDOW_TOKENS
        if (self._documents_held >= WINDOW_DOCUMENTS and self._tokens_held >= enough) or (
            self._tokens_held >= many
        ):
            self._close_window()

    def finish(self) -> SplitCounts:
        """Write the remaining documents, and return the counts of everything written."""
        if self._window:
            self._close_window()
        self._rows.write_rest()
        return self._counts

    def _close_window(self) -> None:
        documents = concatenate([batch.documents for batch in self._window])
        pieces = self._pack(documents.lengths, self._layout.row_tokens)
        self._table.add(self._split, documents, pieces, first_row=self._counts.rows)
        self._counts += SplitCounts(
            rows=pieces.rows,
            documents=self._documents_held,
            document_tokens=self._tokens_held,
            padding_tokens=pieces.rows * self._layout.row_tokens - self._tokens_held,
            cut_documents=np.count_nonzero(np.bincount(pieces.document[pieces.start > 0])),
            text_bytes=int(documents.text_bytes.sum()),
        )
        rows, first = self._rows.append(pieces.rows, fill=self._end_of_text), 0
        for batch in self._window:
            own = pieces.select(first, first + len(batch.begins))
            packing.lay_out(batch.tokens, batch.begins, batch.ends, own, rows)
            first += len(batch.begins)
        self._window, self._documents_held, self._tokens_held = [], 0, 0
        self._rows.write_full_files()

"""Measure the start of a run on shard sets of many parts, which are simulated.

    python benchmarks/scale.py [--parts 10000 100000 1000000] [--folder DIR] [--json FILE]

One part is built. The others are links to it, and pages of counts list them all, so a set of a
million parts has the files that a real one has, in a folder as large, and takes little space.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
import psutil  # noqa: E402

from zeroflow.data import known_parts, part_counts, slices, statistics  # noqa: E402
from zeroflow.data.build import build_shards  # noqa: E402
from zeroflow.data.corpus import CorpusConfig  # noqa: E402
from zeroflow.data.formats.file import CorpusFile  # noqa: E402
from zeroflow.data.order import Order, Segment  # noqa: E402
from zeroflow.data.rows import Rows  # noqa: E402
from zeroflow.data.shards import ShardConfig, ShardSet, part_path  # noqa: E402
from zeroflow.data.slice_pages import PAGE_SLICES, SlicePage, SlicePages  # noqa: E402
from zeroflow.data.tokenizer import Tokenizer, TokenizerConfig  # noqa: E402
from zeroflow.data.tokenizer_origins import fetch_tokenizer  # noqa: E402

PARTS = (10**4, 10**5, 10**6)
SYNTHETIC = CorpusConfig(data_mode="synthetic")
BATCH_ROWS = 512
FILE_SLICES = 64
"""Slices of each simulated file: 2 GB of text, like those of FineWeb."""


class Figures(NamedTuple):
    parts: int
    tokens: int
    start_seconds: float
    """All that `build_shards` does for a set that is complete, with the verification below."""

    verified_bytes: int
    list_seconds: float
    """Of it, the list of the folder."""

    pages_seconds: float
    """Of it, the pages of counts."""

    pages_bytes: int
    rows_seconds: float
    """Opening the rows, as each rank does."""

    rows_bytes: int
    """Memory of the process that this adds."""

    batch_seconds: float
    """Reading 512 rows anywhere."""

    permutation_seconds: float
    """Choosing them among all rows."""

    statistics_seconds: float
    """Figures of the page of the data."""

    slices_seconds: float
    """Finding the slice of the last part, to build it."""

    slices_bytes: int
    looked_at_seconds: float
    """Estimate for a look into each part without pages, from 1,000 of them."""

    hashed_seconds: float
    """Estimate for a sha256 of each file of each part, from one of them."""


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    into[name] = time.perf_counter() - begun


def built_part(cache: Path, seq_len: int) -> tuple[ShardSet, Tokenizer, ShardConfig]:
    tokenizer = fetch_tokenizer(TokenizerConfig(tokenizer_name="synthetic"), SYNTHETIC, cache)
    config = ShardConfig(seq_len=seq_len, train_rows=1, validation_rows=1)
    return build_shards(config, SYNTHETIC, tokenizer, cache), tokenizer, config


def simulate(one: ShardSet, parts: int) -> None:
    """Make of a set of one part a set of `parts`, all of the same content."""
    for number in range(1, parts):
        part_path(one.path, number).symlink_to(one.part(0).name)
    for page in range(parts // part_counts.PAGE_PARTS):
        if page == 0:
            part_counts.write_page(one.path, 0)
            first = one.path / "counts-00000.arrow"
        else:
            shutil.copyfile(first, one.path / f"counts-{page:05d}.arrow")


def simulated_slices(folder: Path, parts: int) -> tuple[SlicePages, int]:
    """The slices of large files, in pages; and the bytes of these."""
    pages = -(-parts // PAGE_SLICES)
    names = (f"data/{number:06d}.parquet" for number in range(pages * PAGE_SLICES // FILE_SLICES))
    files = [CorpusFile(name=name, size=2**31) for name in names]
    folder.mkdir()
    size = 0
    for first in range(0, pages * PAGE_SLICES, PAGE_SLICES):
        pieces = [
            slices.Slice(files=(files[n // FILE_SLICES],), start=n, stop=n + 1)
            for n in range(first, first + PAGE_SLICES)
        ]
        page = SlicePage(first=first, next_file=(first + PAGE_SLICES) // FILE_SLICES, slices=pieces)
        size += page.save(folder).stat().st_size
    begin = SlicePage(first=0, next_file=0, slices=())
    return SlicePages(folder, SYNTHETIC, files, begin), size


def seconds_each(number: int, act: Callable[[int], object]) -> float:
    begun = time.perf_counter()
    for i in range(number):
        act(i)
    return (time.perf_counter() - begun) / number


def measure(parts: int, folder: Path, seq_len: int = 2048) -> Figures:
    parts -= parts % part_counts.PAGE_PARTS
    one, tokenizer, config = built_part(folder / "cache", seq_len)
    simulate(one, parts)
    found: dict[str, float] = {}
    lines = part_counts.pages(one.path, 1)
    size = int(lines[0, part_counts.COLUMNS.index("row_bytes")])
    all_rows = config.replace(train_rows=parts * one.train.rows, validation_rows=1)
    with timed(found, "pages"):
        part_counts.pages(one.path)
    with timed(found, "list"):
        known_parts.present(one.path, parts)
    with timed(found, "start"):
        shards = build_shards(all_rows, SYNTHETIC, tokenizer, folder / "cache")
    assert shards.reused and shards.parts == parts
    before = psutil.Process().memory_info().rss
    with timed(found, "rows"):
        rows = Rows(shards, "train")
    memory = psutil.Process().memory_info().rss - before
    order = Order([Segment(batch=0, rows=len(rows))], batch_rows=BATCH_ROWS, seed=0)
    order.rows(np.array([0]))
    with timed(found, "permutation"):
        chosen = order.rows(np.array([1])).ravel()
    with timed(found, "batch"):
        rows[chosen]
    with timed(found, "statistics"):
        statistics.gather(shards, tokenizer)
    pages, slice_bytes = simulated_slices(folder / "slices", parts)
    with timed(found, "slices"):
        assert pages.slice(parts - 1)
    looked = seconds_each(min(parts, 1000), lambda n: part_counts.stored(one.path, n))
    hashed = seconds_each(1, lambda n: known_parts.existing_part(shards.part(n)))
    page_bytes = sum(path.stat().st_size for path in one.path.glob("counts-*"))
    return Figures(
        parts=parts,
        tokens=shards.train.document_tokens,
        start_seconds=found["start"],
        verified_bytes=min(parts * size, known_parts.VERIFIED_BYTES),
        list_seconds=found["list"],
        pages_seconds=found["pages"],
        pages_bytes=page_bytes,
        rows_seconds=found["rows"],
        rows_bytes=memory,
        batch_seconds=found["batch"],
        permutation_seconds=found["permutation"],
        statistics_seconds=found["statistics"],
        slices_seconds=found["slices"],
        slices_bytes=slice_bytes,
        looked_at_seconds=looked * parts,
        hashed_seconds=hashed * parts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, nargs="+", default=PARTS)
    parser.add_argument("--folder", type=Path, help="for the sets; default: a temporary one")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    found = []
    for parts in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found.append(measure(parts, Path(folder), arguments.seq_len))
    for name in Figures._fields:
        values = [getattr(figures, name) for figures in found]
        sys.stdout.write(f"| {name} | {' | '.join(f'{value:,.4g}' for value in values)} |\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([figures._asdict() for figures in found], indent=2))


if __name__ == "__main__":
    main()

"""Output of a run: records, pages, pictures and comparisons."""

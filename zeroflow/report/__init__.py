"""Output of a run: records, pages, plots and comparisons."""

"""What a run shows: records, pages, pictures and comparisons."""

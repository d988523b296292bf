"""The decoder and its sizes, independent of parallelism."""

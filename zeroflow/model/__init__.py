"""The decoder and its sizes. Nothing here knows about parallelism."""

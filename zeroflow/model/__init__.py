"""The decoder and its sizes; nothing here knows of parallelism."""

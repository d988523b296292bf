"""Settings of a run, as requested and as settled."""

"""Schedulers that provide the machines of a run."""

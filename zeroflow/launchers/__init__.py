"""Schedulers that provide the machines of a training."""

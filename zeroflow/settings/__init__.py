"""Requested settings of a run, and the settled ones."""

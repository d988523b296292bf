"""The stages of a run: plain functions, which find their own finished work on disk."""

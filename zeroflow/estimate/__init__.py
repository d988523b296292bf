"""Prediction of memory, speed and disk space, and the figures of earlier runs."""

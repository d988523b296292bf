"""Prediction of memory, speed and disk space, and figures of earlier runs."""

"""Tracking in MLflow, which training never waits for."""

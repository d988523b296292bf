"""Models of finished runs: load, generate, export."""

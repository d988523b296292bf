"""Memory, speed and disk before a run, and what earlier runs took."""

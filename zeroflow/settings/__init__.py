"""Settings of a run: as requested, and as settled, with every default resolved."""

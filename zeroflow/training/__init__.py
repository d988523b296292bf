"""The training process and its launcher."""

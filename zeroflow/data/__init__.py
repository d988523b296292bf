"""Text to tokens, rows, shards and batches."""

"""Proofs around training: the overfit check after it."""

"""Proofs around training: the pre-flight before it, the overfit check after it."""

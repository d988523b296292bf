"""Checks: pre-flight before training, overfit check after it, proof that resume is exact."""

"""Checks of a training: the pre-flight before it, the overfit check after it, the resume proof."""

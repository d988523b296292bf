"""Sources of text files: one module for each kind of place."""

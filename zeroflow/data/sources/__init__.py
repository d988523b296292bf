"""Where the files of a text corpus are kept: one module for each kind of place."""

"""How files of documents are read: one module for each format."""

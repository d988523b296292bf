"""Readers of files of documents: one module for each format."""

"""The command line, made from the settings classes."""

"""Optimisers, one module each: a subclass of `OptimizerConfig` in a module here is a choice."""

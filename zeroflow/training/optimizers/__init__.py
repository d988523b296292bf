"""Optimisers, one module each. Every subclass of `OptimizerConfig` here can be selected."""

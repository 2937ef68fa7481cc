"""Train a model: one process or workers of a Ray cluster."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"app": "cli"})

"""Evaluate query against gallery, measure label quality, collect the figures of an epoch."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"app": "cli"})

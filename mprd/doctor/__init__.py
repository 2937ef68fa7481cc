"""Examination of a data set before training."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"app": "cli"})

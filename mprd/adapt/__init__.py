"""Give the network of a run the statistics of other cameras."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"app": "cli"})

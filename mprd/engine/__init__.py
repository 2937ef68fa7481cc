"""Algorithm 1: the alternating loop of CNN and GCN."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"fit": "trainer"})

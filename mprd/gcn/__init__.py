"""G: the neighborhood of a pair to a likelihood (Sec. 3.2)."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"PairGCN": "network"})

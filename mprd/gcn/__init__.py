"""G, which predicts the likelihood g_ij from the neighborhood of a pair (Sec. 3.2)."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"PairGCN": "network"})

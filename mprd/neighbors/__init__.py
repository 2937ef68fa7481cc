"""NN_k (Sec. 3.2, 5.2), and the similarities that neighbor lists are drawn from."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"find_neighbors": "exact"})

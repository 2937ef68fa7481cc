"""P_i: the positives of an image, by the GCN (Eq. 7) or by a rule (Sec. 5.3)."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"knn": "rules", "mplp": "rules", "ss": "rules", "supervised": "rules"})

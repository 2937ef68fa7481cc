"""MPRD: Meta Pairwise Relationship Distillation for unsupervised person re-identification (ICCV 2021)."""

import os
from typing import TYPE_CHECKING

from mprd.lazy import lazy_names

if TYPE_CHECKING:
    from mprd.model import load_model as load_model

__version__ = "0.1.0"
__getattr__, __all__ = lazy_names(__name__, {"load_model": "model"})

# GNU OpenMP, which comes with torch, has waiting threads spin 300,000 times before they sleep, which slows small
# operators down many times if another process needs the core (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

"""MPRD: Meta Pairwise Relationship Distillation for unsupervised person re-identification (ICCV 2021)."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mprd.model import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]

# GNU OpenMP, which comes with torch, lets a thread that waits for others spin 300,000 times before it sleeps. Beside
# one busy process on two cores each small operator then takes 8 ms for 0.1 (docs/performance.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    """Import torch only where somebody asks for a model."""
    if name == "load_model":
        from mprd.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""MPRD: Meta Pairwise Relationship Distillation for unsupervised person re-identification (ICCV 2021)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mprd.model import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Import torch only where somebody asks for a model."""
    if name == "load_model":
        from mprd.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""MPRD: Meta Pairwise Relationship Distillation for unsupervised person re-identification (ICCV 2021)."""

__version__ = "0.1.0"

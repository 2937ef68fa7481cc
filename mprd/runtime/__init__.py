"""Devices, random generators, checkpoints, and the workers of one model."""

"""Pair graphs and neighbor search in this process or on Ray actors."""

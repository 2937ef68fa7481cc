"""Drawn pedestrians: a data set for when there is none at hand."""

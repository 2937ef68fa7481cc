"""Build pair graphs and search neighbors in this process or on Ray actors."""

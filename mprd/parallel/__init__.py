"""Build pair graphs in this process or on Ray actors."""

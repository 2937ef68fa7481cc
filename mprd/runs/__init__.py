"""The run folder and its lock, console output, HTML pages."""

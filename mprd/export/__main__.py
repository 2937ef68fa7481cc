"""`python -m mprd.export`."""

from mprd.export.cli import app

app(prog_name="python -m mprd.export")

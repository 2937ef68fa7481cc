"""`python -m mprd.report`."""

from mprd.report.cli import app

app(prog_name="python -m mprd.report")

"""`python -m mprd.extract`."""

from mprd.extract.cli import app

app(prog_name="python -m mprd.extract")

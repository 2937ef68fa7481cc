"""`python -m mprd.evaluate`."""

from mprd.evaluate.cli import app

app(prog_name="python -m mprd.evaluate")

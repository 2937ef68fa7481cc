"""`python -m mprd.tune`."""

from mprd.tune.cli import app

app(prog_name="python -m mprd.tune")

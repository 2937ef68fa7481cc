"""`python -m mprd.train`."""

from mprd.train.cli import app

app(prog_name="python -m mprd.train")

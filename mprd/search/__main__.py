"""`python -m mprd.search`."""

from mprd.search.cli import app

app(prog_name="python -m mprd.search")

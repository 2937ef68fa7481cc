"""`python -m mprd.search`."""

from mprd.cli import main
from mprd.search.cli import app

main(app, "python -m mprd.search")

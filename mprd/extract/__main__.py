"""`python -m mprd.extract`."""

from mprd.cli import main
from mprd.extract.cli import app

main(app, "python -m mprd.extract")

"""`python -m mprd.train`."""

from mprd.cli import main
from mprd.train.cli import app

main(app, "python -m mprd.train")

"""`python -m mprd.tune`."""

from mprd.cli import main
from mprd.tune.cli import app

main(app, "python -m mprd.tune")

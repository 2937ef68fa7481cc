"""`python -m mprd.evaluate`."""

from mprd.cli import main
from mprd.evaluate.cli import app

main(app, "python -m mprd.evaluate")

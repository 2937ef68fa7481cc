"""`python -m mprd.adapt`."""

from mprd.adapt.cli import app
from mprd.cli import main

main(app, "python -m mprd.adapt")

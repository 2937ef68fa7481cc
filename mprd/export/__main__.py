"""`python -m mprd.export`."""

from mprd.cli import main
from mprd.export.cli import app

main(app, "python -m mprd.export")

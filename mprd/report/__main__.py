"""`python -m mprd.report`."""

from mprd.cli import main
from mprd.report.cli import app

main(app, "python -m mprd.report")

"""`python -m mprd.doctor`."""

from mprd.cli import main
from mprd.doctor.cli import app

main(app, "python -m mprd.doctor")

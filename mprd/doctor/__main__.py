"""`python -m mprd.doctor`."""

from mprd.doctor.cli import app

app(prog_name="python -m mprd.doctor")

"""Render HTML pages from the package's templates."""

from __future__ import annotations

from importlib import resources
from typing import Any


def render_page(template: str, **values: Any) -> str:
    """Render a template of `mprd/templates`; a variable missing in `values` is an error."""
    import jinja2

    def read(name: str) -> str:
        return resources.files("mprd").joinpath("templates", name).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"show": show, "percent": percent, "signed": signed}
    return environment.get_template(template).render(**values)


def show(value: Any) -> str:
    """Format a value, floats with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(fraction: float | None) -> str:
    """Format a fraction in percent, None as a dash."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def signed(fraction: float) -> str:
    """Format a difference of fractions in percentage points, with its sign."""
    # adding zero turns -0.0 into 0.0
    return f"{round(100 * fraction, 1) + 0.0:+.1f}"

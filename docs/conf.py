"""Sphinx: the Markdown pages, and the reference from docstrings. `make docs` builds without the network."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

import mprd

project = "mprd"
author = copyright = "mprd authors"
version = release = mprd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
# links such as results.md#other-cameras lead to headings as they do on a code host
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
# single backticks in docstrings are code
default_role = "code"
python_display_short_literal_types = True
# examples are set as written, the prompts with them
highlight_language = "default"

html_theme = "pydata_sphinx_theme"
html_title = "mprd"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["mprd.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "navbar_align": "left",
    # all pages are in the sidebar
    "navbar_center": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"**": ["pages.html"]}


def setup(app: Sphinx) -> None:
    """Keep figures and their deviations on one line of a table."""
    app.connect("source-read", lambda _app, _page, text: text.__setitem__(0, text[0].replace(" ± ", "\u00a0±\u00a0")))

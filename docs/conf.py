"""Sphinx: the pages of this folder, and a reference made of the docstrings."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tables  # noqa: E402 - in this folder

import mpromptune  # noqa: E402 - of this folder's repository

tables.write(HERE / "_tables")

project = "m-promptune"
author = "m-promptune contributors"
release = version = mpromptune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_tables"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Docstrings name things in single backticks: what is documented here becomes a link.
default_role = "any"
# Names that are documented elsewhere, or not at all. Links of the pages are checked.
suppress_warnings = ["ref.any"]

html_theme = "furo"
html_title = f"m-promptune {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]

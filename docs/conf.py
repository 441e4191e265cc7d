"""Sphinx: the README, the mathematics, and a reference made of the docstrings."""

import mpromptune

project = "m-promptune"
author = "m-promptune contributors"
release = version = mpromptune.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Docstrings name things in single backticks: what is documented here becomes a link.
default_role = "any"
# Names that are documented elsewhere, or not at all.
suppress_warnings = ["ref.any", "myst.xref_missing"]

html_theme = "furo"
html_title = f"m-promptune {version}"

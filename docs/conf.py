"""How the documentation is built: ``sphinx-build -W docs docs/_build/html`` (extra: ``pip install -e ".[docs]"``)."""

import importlib.metadata
import os

# Code cells and docstrings run on the CPU, wherever the documentation is built.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "jrnn"
author = "the jrnn authors"
project_copyright = "2026, the jrnn authors"
release = version = importlib.metadata.version("jrnn")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute"]

# Pages are Markdown whose code cells run when the documentation is built. A cell that raises fails the build. The pages
# as notebooks, with what their cells gave, are left in the folder jupyter_execute beside the output: see docs/start.md.
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Docstrings are in Google's style. What stands in single backticks is a name: a link where there is such a name.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

html_theme = "sphinx_book_theme"
html_title = "jrnn"
html_show_sourcelink = False
html_theme_options = {
    "navbar_persistent": [],  # the search box is in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
}


def _skip_fields(app, what, name, obj, skip, options):
    """The fields of a named tuple, which its docstring describes already."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", _skip_fields)

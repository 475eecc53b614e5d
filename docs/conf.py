"""How Sphinx builds these pages: `make docs`. Nothing is downloaded, and nothing is written but to the output."""

import sparsekern
from sparsekern.info import markdown_table

project = "sparsekern"
version = release = sparsekern.__version__
html_title = f"sparsekern {version}"
html_theme = "furo"
html_show_copyright = False
html_copy_source = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["substitution"]
myst_substitutions = {"back_ends": markdown_table()}
myst_heading_anchors = 3

default_role = "literal"  # single backticks in docstrings are code
napoleon_numpy_docstring = False
napoleon_use_ivar = False
autodoc_inherit_docstrings = False  # none of nn.Module's boilerplate
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

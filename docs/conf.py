"""Sphinx configuration: the pages of this folder and the API from the docstrings."""

import qatfast

project = "qatfast"
author = "qatfast developers"
project_copyright = "2026, qatfast developers"
version = release = qatfast.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
myst_enable_extensions = ["dollarmath", "colon_fence", "substitution"]
_functions = "\n".join(f".. autofunction:: qatfast.{name}" for name in qatfast.functional.__all__)
myst_substitutions = {"functions": f"```{{eval-rst}}\n{_functions}\n```"}
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
# Types of torch and of Python cannot be resolved without a network; ours are in private modules.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn\.|collections|typing|os\.|tuple|Any|Tensor|Iterator|Mapping).*"),
    (
        "py:.*",
        r"qatfast\.(config\.(Granularity|Range)|model\.Summary(Row)?|calibration\.Model|integer\.Integer.*)",
    ),
]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"qatfast {release}"
html_copy_source = False
html_show_sphinx = False

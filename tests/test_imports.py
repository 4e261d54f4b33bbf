"""The package does not import its study or its benchmarks, except in the command line."""

import ast
from pathlib import Path

import pytest

import qatfast

PACKAGE = Path(qatfast.__file__).parent
TOOLS = {"study", "bench"}
# The command line runs the tools, and __main__ runs the command line.
PRODUCT = sorted(
    path.relative_to(PACKAGE).as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.name != "cli.py" and path.relative_to(PACKAGE).parts[0] not in TOOLS
)


def imported_modules(source):
    """Returns the names of all modules that ``source``, a file of the package, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["qatfast" if node.level else "", node.module]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # A string may be an argument of importlib.import_module or __import__.
            yield ("qatfast" if node.value.startswith(".") else "") + node.value


def imported_tools(source):
    parts = (name.split(".") for name in imported_modules(source))
    return {names[1] for names in parts if names[0] == "qatfast" and len(names) > 1} & TOOLS


def test_the_modules_are_found():
    assert {"__init__.py", "functional.py", "model.py", "modules/linear.py", "packing.py"} <= set(PRODUCT)
    assert all((PACKAGE / tool / "__init__.py").is_file() for tool in TOOLS)


@pytest.mark.parametrize("name", PRODUCT)
def test_the_product_imports_no_tool(name):
    assert not imported_tools((PACKAGE / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import qatfast.study",
        "import torch, qatfast.study.size as size",
        "from qatfast import functional, study",
        "from qatfast.study.size import save_quantized",
        "from . import study",
        "from .study import save_quantized",
        "from .study.size import save_quantized",
        "def lazy():\n    if True:\n        from .study import size",
        "importlib.import_module('qatfast.study.size')",
        "importlib.import_module('.study', 'qatfast')",
    ],
)
def test_an_import_of_a_tool_is_found(source):
    assert imported_tools(source) == {"study"}
    assert imported_tools(source.replace("study", "bench")) == {"bench"}
    assert imported_tools(source.replace("study", "packing")) == set()

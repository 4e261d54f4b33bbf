"""Whether the packages of the extra ``study`` are installed; imported before any module that needs them."""

from importlib.util import find_spec

for _module in ("matplotlib", "sklearn", "rich"):
    if find_spec(_module) is None:
        raise ModuleNotFoundError(
            f"qatfast.study needs {_module}: pip install matplotlib scikit-learn rich", name=_module
        )

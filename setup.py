"""Builds the extension qatfast._C, and writes qatfast/_build.json: what was built, with what, and if not, why not.

Everything else about the package is in pyproject.toml. Read from the environment: CXX, MAX_JOBS, QATFAST_NO_EXT=1,
QATFAST_DEBUG=1, QATFAST_SANITIZE=address|undefined|thread.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# An isolated build (plain `pip install .`) sees no installed package, but the kernels must be compiled against the
# torch that they will run with: the target environment's. Its folders come last, so the build's own tools win.
sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
if sys.prefix == sys.base_prefix:  # inside a virtual environment the user's own folder is not in use
    sys.path.append(site.getusersitepackages())
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    torch, BuildExtension = None, build_ext

SANITIZERS = {"address": "address", "undefined": "undefined,float-cast-overflow", "thread": "thread"}
NO_TORCH = "torch was not installed when qatfast was built"


def switch(name):
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler():
    """The name of the C++ compiler: CXX, which has to exist, or else the first one found, or None."""
    given = os.environ.get("CXX")
    if not given:
        return next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not shutil.which(given):
        sys.exit(f"qatfast: CXX={given}: no such compiler. Set CXX to a C++ compiler, or unset it.")
    return given


def why_no_kernels(compiler):
    if switch("QATFAST_NO_EXT"):
        return "QATFAST_NO_EXT was set when qatfast was built"
    if sys.platform != "linux":
        return "the kernels are built on Linux only"
    if compiler is None:
        return "no C++ compiler (c++, g++ or clang++) was found when qatfast was built"
    return "" if torch else NO_TORCH


debug = switch("QATFAST_DEBUG")
sanitize = os.environ.get("QATFAST_SANITIZE", "")
if sanitize and sanitize not in SANITIZERS:
    sys.exit(f"qatfast: QATFAST_SANITIZE={sanitize}: expected one of {', '.join(SANITIZERS)}, or unset.")
if switch("FORCE_CUDA"):
    sys.exit(
        "qatfast: FORCE_CUDA is set, but this release has no CUDA kernels: CUDA tensors run through the PyTorch "
        "reference. Unset FORCE_CUDA."
    )

compiler = find_compiler()
reason = why_no_kernels(compiler)
record = {
    "torch": torch.__version__ if torch else None,
    "kernels": not reason,
    "reason": reason,
    "compiler": "",
    "debug": debug,
    "sanitize": sanitize,
}
extensions = []
if not reason:
    os.environ["CXX"] = compiler  # torch would take c++, which may be the one that is missing
    banner = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    record["compiler"] = banner.partition("\n")[0] or compiler
    # No -std: BuildExtension adds the one its torch needs. No -march: one binary for every machine; the loops choose
    # their instruction set at run time. No contraction: every instruction set has to give the same bits.
    compile_flags = ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3", "-g0"]
    compile_flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    compile_flags += ["-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"]
    # As system folders: the warnings are for our code, not for torch's headers.
    compile_flags += [f"-isystem{path}" for path in include_paths()]
    link_flags = ["-fopenmp"]
    if sanitize:
        link_flags.append(f"-fsanitize={SANITIZERS[sanitize]}")
        compile_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
    extensions.append(
        CppExtension(
            "qatfast._C",
            sorted(str(p) for d in ("csrc", "csrc/cpu") for p in Path(d).glob("*.cpp")),
            include_dirs=[str(Path("csrc").resolve())],
            # A flag, so that another torch in the same place makes every object anew: its headers' times do not count.
            define_macros=[("QATFAST_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args={"cxx": compile_flags},
            extra_link_args=link_flags,
            depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
        )
    )


def write_record(folder):
    (Path(folder) / "_build.json").write_text(json.dumps(record, indent=2) + "\n")


class BuildPython(build_py):
    def run(self):
        super().run()
        write_record("qatfast" if self.editable_mode else Path(self.build_lib) / "qatfast")


class BuildKernels(BuildExtension):
    def run(self):
        super().run()
        if self.inplace:
            write_record("qatfast")


setup(
    ext_modules=extensions,
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    # Only where the target environment has no torch: then the newest one is what qatfast will run with.
    setup_requires=["torch"] if reason == NO_TORCH else [],
)

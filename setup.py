"""Builds the extension qatfast._C, and writes qatfast/_build.json: what was built, with what, and if not, why not.

Everything else about the package is in pyproject.toml. Read from the environment: CXX, MAX_JOBS, FORCE_CUDA=1|0,
TORCH_CUDA_ARCH_LIST, CUDA_HOME, QATFAST_NO_EXT=1, QATFAST_DEBUG=1, QATFAST_SANITIZE=address|undefined|thread
(several with commas).
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def find_cuda_home():
    """The CUDA toolkit: CUDA_HOME, or what nvcc names (which may be a wrapper outside of it), or the usual place."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc:
        words = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        listing = subprocess.run(words, capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.*)$", listing, re.MULTILINE)
        return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    return Path("/usr/local/cuda")


cuda_home = find_cuda_home()
if (cuda_home / "bin" / "nvcc").is_file():
    os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it when it is imported

# An isolated build (plain `pip install .`) sees no installed package, but the kernels must be compiled against the
# torch that they will run with: the target environment's. Its folders come last, so the build's own tools win.
sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
if sys.prefix == sys.base_prefix:  # inside a virtual environment the user's own folder is not in use
    sys.path.append(site.getusersitepackages())
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths
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


def why_no_cuda():
    """Why no CUDA kernels are built; empty if they are."""
    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA was 0 when qatfast was built"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    nvcc = cuda_home / "bin" / "nvcc"
    if not nvcc.is_file():
        return f"no CUDA toolkit was found when qatfast was built (nvcc on PATH, or CUDA_HOME; looked in {cuda_home})"
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", banner)
    if not release:
        return f"{nvcc} does not run"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"torch {torch.__version__} is for CUDA {torch.version.cuda}, and nvcc is {release[1]}.{release[2]}"
    return ""


def architectures():
    """What the CUDA kernels are compiled for: TORCH_CUDA_ARCH_LIST, or the GPUs present, or else one architecture.

    TORCH_CUDA_ARCH_LIST=all is every architecture of this torch. The newest of a list is there as PTX too, from which
    the driver makes code for later devices: without a GPU, the oldest one from 8.0 on serves all that came after it.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given and given.lower() != "all":
        return given
    names = re.findall(r"\bsm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")
    built_for = sorted((int(major), int(minor)) for major, minor in names) or [(8, 0)]
    chosen = set(built_for)
    if not given:
        chosen = {min(gpu, built_for[-1]) for gpu in gpus() if gpu >= built_for[0]}
    if not chosen:
        major, minor = next((each for each in built_for if each >= (8, 0)), built_for[-1])
        chosen = {(major, minor)}
        print(
            "qatfast: no GPU was found, so the CUDA kernels are compiled for compute capability "
            f"{major}.{minor} and, as PTX, for later ones. Set TORCH_CUDA_ARCH_LIST to choose others "
            "(9.0, 8.6;9.0+PTX, or all: every one of this torch, which takes several times as long), or FORCE_CUDA=0 "
            "to build for CPUs only.",
            file=sys.stderr,
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(chosen)) + "+PTX"


def gpus():
    """The compute capabilities of the GPUs present; none where the driver does not answer, as in many containers."""
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return [torch.cuda.get_device_capability(device) for device in devices]
    except Exception as error:
        print(f"qatfast: the GPUs cannot be asked for their compute capability ({error}).", file=sys.stderr)
        return []


debug = switch("QATFAST_DEBUG")
sanitize = os.environ.get("QATFAST_SANITIZE", "")
if sanitize and not {*sanitize.split(",")} <= {*SANITIZERS}:
    sys.exit(
        f"qatfast: QATFAST_SANITIZE={sanitize}: expected one of {', '.join(SANITIZERS)}, several with commas, or unset."
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
    "cuda": False,
    "cuda_reason": reason or why_no_cuda(),
    "cuda_architectures": "",
}
if switch("FORCE_CUDA") and record["cuda_reason"]:
    sys.exit(
        f"qatfast: FORCE_CUDA is set, but {record['cuda_reason']}. Unset FORCE_CUDA to build for CPUs only."
    )
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
        link_flags += [f"-fsanitize={SANITIZERS[name]}" for name in sanitize.split(",")]
        compile_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
    patterns = [
        "*.cpp",
        "ops/*.cpp",
        "cpu/**/*.cpp",
        "cuda/plan.cpp",
    ]  # the plan is host arithmetic, tested without CUDA too
    # A flag, so that another torch in the same place makes every object anew: its headers' times do not count.
    macros = [("QATFAST_TORCH_VERSION", f'"{torch.__version__}"')]
    kind = CppExtension
    if not record["cuda_reason"]:
        kind = CUDAExtension
        patterns += ["cuda/*.cpp", "cuda/*.cu"]
        macros.append(("QATFAST_CUDA", "1"))
        record["cuda"] = True
        record["cuda_architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    extensions.append(
        kind(
            "qatfast._C",
            sorted({str(path) for pattern in patterns for path in Path("csrc").glob(pattern)}),
            include_dirs=[str(Path("csrc").resolve())],
            define_macros=macros,
            extra_compile_args={
                "cxx": compile_flags,
                "nvcc": ["-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"],
            },
            extra_link_args=link_flags,
            depends=sorted(str(p) for pattern in ("*.h", "*.cuh") for p in Path("csrc").rglob(pattern)),
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

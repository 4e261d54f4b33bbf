"""Builds the extension qatfast._C, and writes the build record qatfast/_build.json.

All other metadata of the package is in pyproject.toml. Environment variables: CXX, MAX_JOBS,
FORCE_CUDA=1|0, TORCH_CUDA_ARCH_LIST, CUDA_HOME, QATFAST_NO_EXT=1, QATFAST_NATIVE=1, QATFAST_DEBUG=1 and
QATFAST_SANITIZE=address|undefined|thread (several separated by commas).
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
    """Returns the folder of the CUDA toolkit.

    It is CUDA_HOME, or the folder that nvcc reports (nvcc on PATH may be a wrapper elsewhere), or
    the default location.
    """
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
    os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it at import

# An isolated build (plain `pip install .`) does not see the packages of the target environment, but
# the kernels must be compiled against its torch. Its folders come last, so that the tools of the
# build take precedence.
sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
if sys.prefix == sys.base_prefix:  # a virtual environment does not use the user's folder
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
    """Returns the C++ compiler: CXX, which must exist, or else the first on PATH, or None."""
    cxx = os.environ.get("CXX")
    if not cxx:
        return next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not shutil.which(cxx):
        sys.exit(f"qatfast: CXX={cxx}: no such compiler. Set CXX to a C++ compiler, or unset it.")
    return cxx


def why_no_kernels(compiler):
    if switch("QATFAST_NO_EXT"):
        return "QATFAST_NO_EXT was set when qatfast was built"
    if sys.platform != "linux":
        return "the kernels are built on Linux only"
    if compiler is None:
        return "no C++ compiler (c++, g++ or clang++) was found when qatfast was built"
    return "" if torch else NO_TORCH


def why_no_cuda():
    """Returns why no CUDA kernels are built; empty if they are."""
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
    """Returns the architectures of the CUDA kernels, in the format of TORCH_CUDA_ARCH_LIST.

    They are those of TORCH_CUDA_ARCH_LIST (all: every architecture of this torch), or those of the
    GPUs present. If there is no GPU, it is the oldest architecture of this torch from 8.0 on (the
    newest if all are older). The newest architecture is compiled as PTX too, from which the driver
    compiles code for later devices.
    """
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if arch_list and arch_list.lower() != "all":
        return arch_list
    names = re.findall(r"\bsm_(\d+)(\d)\b", torch._C._cuda_getArchFlags() or "")
    supported = sorted((int(major), int(minor)) for major, minor in names) or [(8, 0)]
    selected = set(supported)
    if not arch_list:
        selected = {min(gpu, supported[-1]) for gpu in gpus() if gpu >= supported[0]}
    if not selected:
        major, minor = next((capability for capability in supported if capability >= (8, 0)), supported[-1])
        selected = {(major, minor)}
        print(
            "qatfast: no GPU was found, so the CUDA kernels are compiled for compute capability "
            f"{major}.{minor} and, as PTX, for later ones. Set TORCH_CUDA_ARCH_LIST to choose others "
            "(9.0, 8.6;9.0+PTX, or all for every architecture of this torch, which takes several times as long), "
            "or FORCE_CUDA=0 to build for CPUs only.",
            file=sys.stderr,
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(selected)) + "+PTX"


def gpus():
    """Returns the compute capabilities of the GPUs present.

    Returns an empty list if the driver does not respond, as in many containers.
    """
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        return [torch.cuda.get_device_capability(device) for device in devices]
    except Exception as error:
        print(f"qatfast: the compute capability of the GPUs cannot be read ({error}).", file=sys.stderr)
        return []


def targets_left_out():
    """Returns the files of csrc/cpu/simd/targets that a build for this processor does not need.

    Such a build is that of QATFAST_NATIVE=1, and that with sanitizers. The loops in these files do not
    run on this processor, or not with its ATEN_CPU_CAPABILITY, and compiling them takes as long as
    compiling the others.
    """
    if not (sanitize or switch("QATFAST_NATIVE")):
        return set()
    run = {"AVX512": {"avx512", "avx512_vnni"}, "AVX2": {"avx2"}}.get(
        torch.backends.cpu.get_cpu_capability(), {"baseline"}
    )
    if "avx512" in run and "avx512_bf16" in Path("/proc/cpuinfo").read_text():
        run.add("avx512_bf16")
    return {path for path in Path("csrc/cpu/simd/targets").glob("*.cpp") if path.stem not in run}


def in_one_file(name, *patterns):
    """Writes a file that includes the files of ``csrc`` with these patterns.

    Returns its path in a list, which is empty if there are no such files.

    Compiled separately, each of them spends most of the time on the headers of torch.
    """
    sources = [source for pattern in patterns for source in sorted(Path("csrc").glob(pattern))]
    if not sources:
        return []
    text = "".join(f'#include "{source.relative_to("csrc").as_posix()}"\n' for source in sources)
    path = Path("build", "csrc", f"{name}.cpp")
    if not path.is_file() or path.read_text() != text:  # an unchanged file is not compiled again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(path)]


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
    os.environ["CXX"] = compiler  # torch would use c++, which may be missing
    banner = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    record["compiler"] = banner.partition("\n")[0] or compiler
    # No -std: BuildExtension adds the version that torch needs. No -march: the binary runs on every
    # machine, and the loops select their instruction set at run time. No contraction: every
    # instruction set must return the same bits.
    compile_flags = ["-O0", "-g", "-UNDEBUG", "-D_GLIBCXX_ASSERTIONS"] if debug else ["-O3", "-g0"]
    compile_flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
    compile_flags += ["-fopenmp", "-Wall", "-Wextra", "-Wno-psabi"]
    # -isystem: compiler warnings are for this project's code, not for the headers of torch.
    compile_flags += [f"-isystem{path}" for path in include_paths()]
    link_flags = ["-fopenmp"]
    if sanitize:
        link_flags += [f"-fsanitize={SANITIZERS[name]}" for name in sanitize.split(",")]
        compile_flags += [*link_flags, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g1"]
        if {"address", "undefined"} <= {*sanitize.split(",")}:
            # AddressSanitizer reports what these checks find, which take a fifth of the compiler's time.
            compile_flags += ["-fno-sanitize=null,object-size"]
    # cuda/plan.cpp is host code, which is also tested without CUDA.
    patterns = ["python.cpp", "cpu/simd/targets/*.cpp", "cuda/plan.cpp"]
    # This flag causes a full rebuild after an upgrade of torch: the build ignores the modification
    # times of its headers.
    macros = [("QATFAST_TORCH_VERSION", f'"{torch.__version__}"')]
    left_out = targets_left_out()
    macros += [(f"QATFAST_WITHOUT_{path.stem.upper()}", "1") for path in sorted(left_out)]
    kind = CppExtension
    if not record["cuda_reason"]:
        kind = CUDAExtension
        patterns += ["cuda/*.cpp", "cuda/*.cu"]
        macros.append(("QATFAST_CUDA", "1"))
        record["cuda"] = True
        record["cuda_architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    sources = {path for pattern in patterns for path in Path("csrc").glob(pattern)} - left_out
    extensions.append(
        kind(
            "qatfast._C",
            [  # the files that take longest come first, so that no core is idle at the end
                *in_one_file("ops", "ops/*.cpp", "checks.cpp", "library.cpp"),
                *in_one_file("cpu", "cpu/*.cpp", "cpu/simd/*.cpp"),
                *sorted(map(str, sources)),
            ],
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
    # If the target environment has no torch, pip installs the newest version.
    setup_requires=["torch"] if reason == NO_TORCH else [],
)

"""Builds, distributions and installations, and the messages if parts are missing."""

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import qatfast
from qatfast import kernels

ROOT = Path(__file__).parent.parent
RECORD_KEYS = {"torch", "kernels", "reason", "compiler", "debug", "sanitize"}
RECORD_KEYS |= {"cuda", "cuda_reason", "cuda_architectures"}
SWITCHES = (
    "CXX",
    "CUDA_HOME",
    "FORCE_CUDA",
    "QATFAST_NO_EXT",
    "QATFAST_NATIVE",
    "QATFAST_DEBUG",
    "QATFAST_SANITIZE",
    "PYTHONPATH",
    "TORCH_CUDA_ARCH_LIST",
)

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in the source tree only")


def python(*arguments, cwd, **environment):
    """Runs this Python with no other build variables than those passed."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def succeeds(run):
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture
def package(tmp_path):
    """Returns a folder with the package as installed without kernels, but without _build.json."""
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "study")
    shutil.copytree(Path(qatfast.__file__).parent, tmp_path / "qatfast", ignore=ignored)
    return tmp_path


@pytest.fixture
def project(package):
    """Returns a folder with the files that setup.py needs, without C++ sources."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, package)
    (package / "csrc").mkdir()
    return package


def record_of(project):
    return json.loads((project / "qatfast" / "_build.json").read_text())


# The installation


def test_kernels_load_where_they_were_built():
    if os.environ.get("QATFAST_NO_EXT"):
        assert "QATFAST_NO_EXT" in kernels.reason()
    elif kernels.build_record()["kernels"]:
        assert kernels.reason() == ""


def test_the_record_names_the_torch_it_was_built_with():
    record = kernels.build_record()
    assert set(record) == RECORD_KEYS
    assert record["torch"] == torch.__version__
    assert record["kernels"] == (record["reason"] == "") == (record["compiler"] != "")


def test_the_version_is_the_installed_one():
    assert importlib.metadata.version("qatfast") == qatfast.__version__


def test_only_torch_numpy_and_safetensors_are_required():
    requirements = importlib.metadata.requires("qatfast")
    assert sorted(r.split(">")[0] for r in requirements if "extra ==" not in r) == [
        "numpy",
        "safetensors",
        "torch",
    ]


def test_import_loads_no_plotting_and_no_learning_library(tmp_path):
    heavy = "{'matplotlib', 'sklearn', 'rich', 'pandas', 'onnxruntime'}"
    run = succeeds(python("-c", f"import sys, qatfast; print({heavy} & set(sys.modules))", cwd=ROOT))
    assert run.stdout.strip() == "set()"


# Messages without kernels

FORGET = "for name in [n for n in sys.modules if n.partition('.')[0] == 'qatfast']: del sys.modules[name]"

# Imports and uses the package in each of these folders. A single process does so, because importing
# torch takes most of the time.
USE = f"""
import contextlib, io, json, sys, warnings
import torch
x = torch.linspace(-1, 3, 1000)
found = []
for folder in sys.argv[1:]:
    {FORGET}
    sys.path[0] = folder
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import qatfast
        y = qatfast.fake_quantize(x, 4)
        y = qatfast.fake_quantize(x, 4)
    assert qatfast.__file__.startswith(folder) and torch.equal(y, qatfast.reference.fake_quantize(x, 4))
    from qatfast import cli
    with contextlib.redirect_stdout(io.StringIO()) as info:
        cli.main(["info"])
    found.append(([str(w.message) for w in caught], info.getvalue()))
print(json.dumps(found))
"""


def used(folders):
    """Returns the only warning of the package in each folder, and what ``qatfast info`` prints."""
    found = json.loads(succeeds(python("-c", USE, *folders, cwd=folders[0])).stdout)
    return [(warning, info) for (warning,), info in found]


def copy_of(package, name):
    return shutil.copytree(package / "qatfast", package / name / "qatfast").parent


def test_one_warning_says_why_there_are_no_kernels(package):
    records = {
        "not installed": None,
        f"built with torch 2.0.0, and this is torch {torch.__version__}": {"torch": "2.0.0", "kernels": True},
        "is damaged": {"kernels": True},
        "Install a C++ compiler": {"kernels": False, "reason": "no C++ compiler was found"},
        "QATFAST_NO_EXT was set": {"kernels": False, "reason": "QATFAST_NO_EXT was set"},
    }
    folders = [copy_of(package, f"copy_{index}") for index in range(len(records))]
    for folder, record in zip(folders, records.values(), strict=True):
        (folder / "qatfast" / "_C.abi3.so").write_text("damaged")
        if record is not None:
            whole = {"torch": torch.__version__, "reason": "", "compiler": "", "debug": False, "sanitize": ""}
            (folder / "qatfast" / "_build.json").write_text(json.dumps(whole | record))
    for said, (warning, _) in zip(records, used(folders), strict=True):
        assert said in warning


def test_a_damaged_record_is_a_warning_with_the_cure(package):
    records = [
        (b"", "Expecting value"),
        (b'{"torch": "2.13.0", "kern', "Unterminated string"),
        (b"\xff\xfe\x00", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[1, 2]", "does not say what was built"),
        (b"{}", "does not say what was built"),
        (b'{"name": "another project", "reason": ""}', "does not say what was built"),
        (b'{"torch": "2.13.0", "kernels": "yes", "reason": ""}', "does not say what was built"),
        (b'{"torch": "2.13.0", "kernels": false, "reason": null}', "does not say what was built"),
        (None, "cannot be read (Is a directory)"),
    ]
    folders = [copy_of(package, f"copy_{index}") for index in range(len(records))]
    for folder, (content, _) in zip(folders, records, strict=True):
        path = folder / "qatfast" / "_build.json"
        path.mkdir() if content is None else path.write_bytes(content)
    for folder, (_, said), (warning, info) in zip(folders, records, used(folders), strict=True):
        assert f"{folder / 'qatfast' / '_build.json'} " in warning and said in warning
        assert "nstall qatfast again" in warning
        assert said in info


@pytest.fixture
def copies(tmp_path):
    """Returns two folders, each with a copy of the installed package."""
    if kernels.reason():
        pytest.skip(f"kernels are not loaded: {kernels.reason()}")
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        ignored = shutil.ignore_patterns("__pycache__", "study")
        shutil.copytree(Path(qatfast.__file__).parent, folder / "qatfast", ignore=ignored)
    return folders


def library_in(folder):
    (path,) = (folder / "qatfast").glob("_C*.so")
    return path


def test_a_cut_library_is_a_warning_and_no_bus_error(copies):
    folders = [copy_of(copies[0], f"{part:.1%}") for part in (0, 0.01, 0.5, 0.999)]
    for folder in folders:
        path = library_in(folder)
        os.truncate(path, int(path.stat().st_size * float(folder.name.rstrip("%")) / 100))
    for folder, (warning, _) in zip(folders, used(folders), strict=True):
        assert f"the library {library_in(folder)} is damaged" in warning


def test_a_library_for_another_python_is_a_warning_that_names_it(copies):
    other, none = copies
    name = library_in(other).rename(other / "qatfast" / "_C.cpython-39-x86_64-linux-gnu.so").name
    library_in(none).unlink()
    (warning, _), (warning_of_none, _) = used(copies)
    assert "there is no library for Python" in warning and name in warning
    assert "(found: none)" in warning_of_none


AGAIN = """
import importlib, sys
import torch, qatfast
from qatfast import functional, kernels
assert not kernels.reason(), kernels.reason()
first, x = qatfast.fake_quantize, torch.linspace(-1, 3, 1000)
{again}
import qatfast
from qatfast import kernels
print(kernels.reason())
for warned in range(2):
    assert torch.equal(qatfast.fake_quantize(x, 4), first(x, 4))
    qatfast.QATLinear(1000, 2)(x).sum().backward()
assert torch.equal(torch.compile(qatfast.fake_quantize, backend="eager", fullgraph=True)(x, 4), first(x, 4))
"""


@pytest.mark.parametrize(
    "again",
    [
        "for module in (qatfast, kernels, functional): importlib.reload(module)",
        FORGET,
        FORGET + "\nsys.path.insert(0, r'{link}')",
    ],
    ids=["reload", "import again", "through a link"],
)
def test_the_same_library_twice_in_a_process_serves_on(copies, again):
    link = copies[0].with_name("link")
    link.symlink_to(copies[0])
    run = succeeds(python("-W", "error", "-c", AGAIN.format(again=again.format(link=link)), cwd=copies[0]))
    assert run.stdout.strip() == ""


def test_a_second_copy_in_a_process_is_a_warning_and_no_abort(copies):
    first, second = copies
    again = f"{FORGET}\nsys.path.insert(0, r'{second}')"
    run = succeeds(python("-c", AGAIN.format(again=again), cwd=first))
    assert (
        f"another copy of qatfast has loaded its kernels in this process ({library_in(first)})" in run.stdout
    )
    assert f"this copy is {second / 'qatfast'}" in run.stdout
    assert run.stderr.count("RuntimeWarning: qatfast runs without its compiled kernels") == 1


def test_import_needs_no_home_and_writes_nothing(copies):
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(copies[0].rglob("*"))
    run = subprocess.run(
        [sys.executable, "-c", "import qatfast; print(qatfast.kernels.reason())"],
        cwd=copies[0],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert succeeds(run).stdout.strip() == ""
    assert sorted(copies[0].rglob("*")) == before


def test_python_m_qatfast_is_the_command():
    run = succeeds(python("-m", "qatfast", "--help", cwd=ROOT))
    assert run.stdout.startswith("usage: qatfast ") and "__main__" not in run.stdout
    assert (
        succeeds(python("-m", "qatfast", "--version", cwd=ROOT)).stdout == f"qatfast {qatfast.__version__}\n"
    )
    run = python("-m", "qatfast", "visualize", "--bits", "1", cwd=ROOT)
    assert (run.returncode, run.stderr.partition(":")[0]) == (2, "qatfast visualize")


# The README and the pages of docs/ with Python code


@needs_source
@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    path = tmp_path / "page.py"
    path.write_text("\n".join(blocks))
    warnings = () if kernels.reason() else ("-W", "error::RuntimeWarning")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    package = str(Path(qatfast.__file__).parent.parent)
    succeeds(python(*warnings, path, cwd=tmp_path, PYTHONPATH=package, **group))


@needs_source
def test_the_versions_that_are_claimed_are_those_that_ci_tests():
    readme = (ROOT / "README.md").read_text()
    pairs = re.findall(r"(\d\.\d+) \(Python (3\.\d+)\)", readme)
    assert len(pairs) == 3
    (oldest_torch, oldest), (torch_between, _), (newest_torch, newest) = pairs
    ci = (ROOT / ".ci" / "run").read_text()
    assert f'OLDEST=(python{oldest} "torch=={oldest_torch}.' in ci
    assert (
        f'FIRST_TORCH="torch=={torch_between}.' in ci
        and f"TORCH ?= torch=={torch_between}." in (ROOT / "Makefile").read_text()
    )
    assert f'NEWEST=(python{newest} "torch=={newest_torch}.' in ci
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={oldest_torch}"' in project and f'requires-python = ">={oldest}"' in project
    assert re.findall(r"Python :: (3\.\d+)", project) == [python for _, python in pairs]


# setup.py


@needs_source
@pytest.mark.parametrize(
    "environment, said",
    [
        (
            {"QATFAST_SANITIZE": "address,memory"},
            "QATFAST_SANITIZE=address,memory: expected one of address, undefined, thread",
        ),
        (
            {"FORCE_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "FORCE_CUDA is set, but " + ("no CUDA toolkit was found" if torch.version.cuda else "torch"),
        ),
        ({"CXX": "no-such-c++"}, "CXX=no-such-c++: no such compiler"),
    ],
    ids=["sanitizer", "FORCE_CUDA", "CXX"],
)
def test_a_wrong_switch_is_one_line(project, environment, said):
    run = python("setup.py", "--name", cwd=project, **environment)
    assert run.returncode == 1
    assert said in run.stderr
    assert run.stderr.count("\n") == 1


@needs_source
@pytest.mark.parametrize(
    "environment, said",
    [({"QATFAST_NO_EXT": "1"}, "QATFAST_NO_EXT"), ({"PATH": "/nowhere"}, "no C++ compiler")],
    ids=["switched off", "no compiler"],
)
def test_a_build_without_kernels_records_why(project, environment, said):
    succeeds(python("setup.py", "-q", "build_ext", "--inplace", cwd=project, **environment))
    record = record_of(project)
    assert set(record) == RECORD_KEYS
    assert (record["kernels"], record["torch"]) == (False, torch.__version__)
    assert said in record["reason"]


@needs_source
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_compiler_that_fails_stops_the_build_with_its_message(project):
    (project / "csrc" / "python.cpp").write_text("#error broken on purpose\n")
    run = python("setup.py", "-q", "build_ext", "--inplace", cwd=project)
    assert run.returncode != 0
    assert "broken on purpose" in run.stdout + run.stderr
    assert not (project / "qatfast" / "_build.json").exists()


@needs_source
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_switches_reach_the_compiler_and_the_record(project):
    (project / "csrc" / "python.cpp").write_text(
        '#ifdef NDEBUG\n#error no asserts\n#endif\nextern "C" void* PyInit__C() { return nullptr; }\n'
    )
    switches = {"QATFAST_DEBUG": "1", "QATFAST_SANITIZE": "address,undefined", "CXX": "g++"}
    run = succeeds(python("setup.py", "-q", "build_ext", "--inplace", cwd=project, **switches))
    (command,) = (line for line in run.stdout.splitlines() if " -c " in line)
    sanitizers = "-fsanitize=address -fsanitize=undefined"
    for flag in ("g++", "-O0", "-ffp-contract=off", sanitizers, f"-I{project / 'csrc'}"):
        assert flag in command.split() or flag in command
    assert "-march" not in command
    record = record_of(project)
    assert (record["kernels"], record["debug"], record["sanitize"]) == (True, True, "address,undefined")


@needs_source
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("switch", [{}, {"QATFAST_SANITIZE": "undefined"}, {"QATFAST_NATIVE": "1"}], ids=str)
def test_a_build_for_this_processor_has_its_loops_only(project, switch):
    (project / "csrc" / "python.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }\n')
    targets = project / "csrc" / "cpu" / "simd" / "targets"
    targets.mkdir(parents=True)
    for name in ("baseline", "avx2"):
        (targets / f"{name}.cpp").touch()
    switches = {**switch, "ATEN_CPU_CAPABILITY": "default", "QATFAST_DEBUG": "1"}
    run = succeeds(python("setup.py", "-q", "build_ext", "--inplace", cwd=project, **switches))
    compiled = {"baseline"} if switch else {"baseline", "avx2"}
    assert set(re.findall(r" -c \S*/targets/(\w+)\.cpp", run.stdout)) == compiled
    assert ("-DQATFAST_WITHOUT_AVX2=1" in run.stdout) == bool(switch)
    assert "WITHOUT_BASELINE" not in run.stdout


FAKE_TORCH = {
    "__init__.py": """
import os
from types import SimpleNamespace
from torch import cuda, version
__version__ = "2.99.0"
flags = os.environ.get("FAKE_FLAGS", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120")
_C = SimpleNamespace(_cuda_getArchFlags=lambda: flags)
""",
    "version.py": "cuda = '13.0'",
    "cuda.py": """
import os
given = os.environ["FAKE_GPUS"]
gpus = [tuple(map(int, gpu.split("."))) for gpu in given.split()] if given[:1].isdigit() else []
def is_available():
    return given != ""
def device_count():
    return 1 if given == "broken" else len(gpus)
def get_device_capability(device):
    if given == "broken":
        raise RuntimeError("CUDA driver initialization failed")
    return gpus[device]
""",
    "utils/__init__.py": "",
    "utils/cpp_extension.py": """
import os
from setuptools import Extension
from setuptools.command.build_ext import build_ext
class BuildExtension(build_ext):
    def run(self):
        print("list:", os.environ.get("TORCH_CUDA_ARCH_LIST"))
def CppExtension(name, sources, **arguments):
    return Extension(name, sources)
CUDAExtension = CppExtension
def include_paths():
    return []
""",
}


@needs_source
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(
    "gpus, environment, expected, said",
    [
        ("", {}, "8.0+PTX", "no GPU was found, so the CUDA kernels are compiled for compute capability 8.0"),
        ("broken", {}, "8.0+PTX", "(CUDA driver initialization failed)"),
        ("", {"FAKE_FLAGS": "sm_70 sm_75"}, "7.5+PTX", "compute capability 7.5"),
        ("", {"FAKE_FLAGS": "sm_90 sm_120"}, "9.0+PTX", "compute capability 9.0"),
        ("", {"FAKE_FLAGS": ""}, "8.0+PTX", "compute capability 8.0"),
        ("9.0", {}, "9.0+PTX", ""),
        ("9.0 8.9 9.0", {}, "8.9;9.0+PTX", ""),
        ("12.1", {}, "12.0+PTX", ""),  # newer than the kernels of this torch
        ("6.1", {}, "8.0+PTX", "no GPU was found"),  # older than this torch supports
        ("9.0", {"TORCH_CUDA_ARCH_LIST": "8.6;9.0"}, "8.6;9.0", ""),
        ("", {"TORCH_CUDA_ARCH_LIST": "8.6"}, "8.6", ""),
        ("9.0", {"TORCH_CUDA_ARCH_LIST": "All"}, "7.5;8.0;8.6;9.0;10.0;12.0+PTX", ""),
        ("broken", {"TORCH_CUDA_ARCH_LIST": "all"}, "7.5;8.0;8.6;9.0;10.0;12.0+PTX", ""),
    ],
)
def test_cuda_is_compiled_for_the_gpus_present_or_one_architecture(
    project, gpus, environment, expected, said
):
    for name, text in FAKE_TORCH.items():
        path = project / "fake" / "torch" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    nvcc = project / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    environment = {
        "PYTHONPATH": str(project / "fake"),
        "CUDA_HOME": str(project / "cuda"),
        "FAKE_GPUS": gpus,
    } | environment
    run = succeeds(python("setup.py", "-q", "build_ext", "--inplace", cwd=project, **environment))
    assert f"list: {expected}" in run.stdout.splitlines()
    record = record_of(project)
    assert (record["cuda"], record["cuda_architectures"]) == (True, expected)
    assert said in run.stderr if said else "qatfast:" not in run.stderr


# Distributions


def build(kind, source, out):
    arguments = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", out)
    succeeds(python(*arguments, cwd=source, QATFAST_NO_EXT="1"))
    return next(out.iterdir())


@needs_source
def test_the_sdist_holds_the_sources_and_nothing_built(tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "dist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 5
    expected = [p.relative_to(ROOT).as_posix() for p in sources]
    expected += [
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "Makefile",
        ".ci/run",
        "tests/test_packaging.py",
    ]
    assert not set(expected) - names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]


@needs_source
def test_a_wheel_without_kernels_runs_anywhere_and_says_why_it_has_none(project):
    wheel = build("wheel", project, project / "dist")
    assert wheel.name == f"qatfast-{qatfast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("qatfast/_build.json"))
    assert "qatfast/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    assert (record["kernels"], record["torch"]) == (False, torch.__version__)

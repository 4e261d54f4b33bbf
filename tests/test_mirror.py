"""An operator has the same name in schema, function, reference, C++ files, tests and benchmarks."""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import qatfast
from operators import IMPLEMENTATIONS, OPERATORS, operators
from qatfast import functional, reference

ROOT = Path(__file__).parent.parent
# Other sources of a device.
SHARED = {
    "cpu": {
        "copy",
        "observe_range",
        "int8_convolution",
        "int8_gemm",
        "int8_windows",
        "depthwise",
        "pair_products",
        "pointwise",
        "relu",
        "static_range",
    },
    "cuda": {"plan", "observe_range", "relu", "static_range", "int8_gemm", "int8_windows"},
}
SOURCES = {".cpp", ".cu"}
SCHEMAS = ROOT / "csrc" / "operator_list.h"

OPS = pytest.mark.parametrize("op", operators(), ids=str)
ON_EACH_DEVICE = pytest.mark.parametrize(
    "op, name_of_device", [(op, device) for op in operators() for device in op.devices], ids=str
)


class Schema(NamedTuple):
    devices: tuple[str, ...]
    text: str


def operator_list():
    """Returns {operator: Schema} and the operators of QATFAST_MAP as the source defines them."""
    source = SCHEMAS.read_text().replace("\\\n", "\n")
    before, of_map, after = re.split(r"^#define QATFAST_MAP\(name\)\s(.*?)^#endif", source, flags=re.M | re.S)
    mapped = re.findall(r"^QATFAST_MAP\((\w+)\)", after, re.MULTILINE)
    source = before + after + "".join(re.sub(r"\bname(##)?", op, of_map) for op in mapped)
    found = re.findall(r'^ *QATFAST_OPERATOR\((\w+), (\w+), \w+,((?:\s*"[^"]+")+)', source, re.MULTILINE)
    devices = {"all": ("cpu", "cuda"), "cpu": ("cpu",)}
    return {
        op: Schema(devices[kind], "".join(re.findall(r'"([^"]+)"', text))) for op, kind, text in found
    }, mapped


SCHEMA_OF, MAPPED = operator_list()


def test_there_are_no_others():
    public = {
        name
        for name, value in vars(functional).items()
        if inspect.isfunction(value) and name[0] != "_" and value.__module__ == functional.__name__
    }
    assert public == {*OPERATORS}, "each public function has an entry in tests/operators.py"
    assert public <= {*SCHEMA_OF}, "each public function has an entry in csrc/operator_list.h"


@OPS
def test_the_package_exports_it(op):
    assert op.name in qatfast.__all__
    assert getattr(qatfast, op.name) is getattr(functional, op.name)


@OPS
def test_the_reference_has_the_same_signature(op):
    ours, theirs = (inspect.signature(getattr(module, op.name)) for module in (functional, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@OPS
def test_the_schema_has_the_same_arguments(op):
    arguments = SCHEMA_OF[op.name].text.split("(", 1)[1].rsplit(") ->", 1)[0]
    names = [
        argument.split()[-1].split("=")[0] for argument in re.sub(r"\[[^\]]*\]", "", arguments).split(", ")
    ]
    public = list(inspect.signature(getattr(functional, op.name)).parameters)
    if public[-1] == "config":  # autocast passes the dtype
        public[-1:] = ["specs", "*", "dtype"]
    assert names == public


@pytest.mark.parametrize("name", SCHEMA_OF)
def test_torch_ops_has_it(kernels, name):
    assert str(getattr(torch.ops.qatfast, name).default._schema).startswith(f"qatfast::{name}(")


@OPS
def test_the_direct_entry_has_it(kernels, op):
    assert callable(getattr(kernels, op.name))


@OPS
def test_it_has_its_files(op):
    places = ["tests/test_{op}.py"] if op.name in MAPPED else ["tests/test_{op}.py", "csrc/ops/{op}.cpp"]
    for place in places:
        assert (ROOT / place.format(op=op)).is_file(), f"there is no {place.format(op=op)}"


@pytest.mark.parametrize("name_of_device", SHARED)
def test_no_other_file_of_a_device_is_an_operator_of_another_name(name_of_device):
    folder = ROOT / "csrc" / name_of_device
    files = {path.stem for path in folder.iterdir() if path.suffix in SOURCES}
    own = {op.name for op in operators(name_of_device)} - {*MAPPED}
    known = own | SHARED[name_of_device]
    assert files <= known, "no operator of tests/operators.py has these files"


# Kernels

THROWS = re.compile(
    r"throw\b|AT_ERROR\(|C10_THROW_ERROR\(|(std::)?(abort|terminate)\(|(TORCH|C10)_\w*CHECK\w*\(\s*(false|0)\b"
    r"|TORCH_INTERNAL_ASSERT\w*\(\s*(false|0)\b"
)


def after_bracket(text, start, pair):
    """Returns the position after the bracket that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == pair[0]) - (text[position] == pair[1])
        if depth == 0:
            return position + 1
    raise AssertionError(f"no {pair[1]} closes the {pair[0]} at {start}")


def bodies_of(source, function):
    """Returns the bodies of all functions with this name, without comments and strings."""
    source = re.sub(
        r""""(\\.|[^"\\\n])*"|'(\\.|[^'\\\n])'|//[^\n]*|/\*.*?\*/|^#[^\n]*""",
        "",
        source,
        flags=re.DOTALL | re.MULTILINE,
    )
    bodies = []
    for found in re.finditer(rf"^[\w:<>,&*][\w:<>,&* ]*\s{function}(?=\()", source, re.MULTILINE):
        end = after_bracket(source, found.end(), "()")
        brace = re.compile(r"[\s\w]*(?=\{)").match(source, end)
        if brace:
            bodies.append(source[brace.end() + 1 : after_bracket(source, brace.end(), "{}") - 1])
    return bodies


def throws_always(body):
    """Returns whether a statement of the body, outside of nested blocks, throws."""
    while (flat := re.sub(r"\{[^{}]*\}", ";", body)) != body:
        body = flat
    return any(THROWS.match(statement.strip()) for statement in body.split(";"))


def assert_launches(source, function):
    bodies = bodies_of(source, function)
    assert any(body.strip() for body in bodies), f"no launcher {function} is defined"
    assert not any(map(throws_always, bodies)), f"the launcher {function} throws whatever it is given"


@pytest.mark.parametrize(
    "op, name_of_device",
    [(op, device) for op in operators() if op.name not in MAPPED for device in op.devices],
    ids=str,
)
def test_its_file_defines_the_launcher(op, name_of_device):
    files = [path for path in (ROOT / "csrc" / name_of_device).glob(f"{op}.*") if path.suffix in SOURCES]
    assert len(files) == 1, f"expected one file csrc/{name_of_device}/{op}.*, found {files}"
    source = files[0].read_text()
    assert_launches(source, op.name if bodies_of(source, op.name) else f"{op.name}_backward")


GUARDED = """
void scaled(const Tensor& x, int n) {
  if (n == 0) {
    return;
  }
  if (n < 0) {
    throw std::runtime_error("{");
  }
  // throw 1;
  with_type(x, [&](auto type) {
    launch(type);
  });
}
"""


def test_a_launcher_that_computes_is_found():
    assert_launches(GUARDED, "scaled")
    assert_launches("template <class T>\nvoid scaled(T x) {\n  launch(x);\n}\n", "scaled")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "void scaled(const Tensor& x);\n",
        "void rescaled(const Tensor& x) {\n  launch(x);\n}\n",
        "void other(const Tensor& x) {\n  scaled(x);\n}\n",
        "// void scaled(const Tensor& x) { launch(x); }\n",
        "void scaled(const Tensor& x) {\n  // launch(x);\n}\n",
        'void scaled(const Tensor& x) {\n  throw std::runtime_error("scaled");\n}\n',
        'void scaled(const Tensor&) {\n  TORCH_CHECK(false, "scaled: expected a CPU tensor");\n}\n',
        "void scaled(const Tensor&) {\n  TORCH_CHECK_NOT_IMPLEMENTED(false);\n}\n",
        GUARDED.replace("  with_type", "  AT_ERROR(0);\n  with_type"),
    ],
)
def test_what_is_no_launcher_is_found(source):
    with pytest.raises(AssertionError, match="launcher scaled"):
        assert_launches(source, "scaled")


@pytest.mark.parametrize(
    "name, name_of_device",
    [(name, device) for name, schema in SCHEMA_OF.items() for device in schema.devices],
)
def test_the_kernel_is_registered(kernels, name, name_of_device):
    if name_of_device == "cuda" and not kernels.has_cuda:
        pytest.skip("the extension is built without CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qatfast::{name}", name_of_device.upper())


@ON_EACH_DEVICE
def test_the_kernel_computes(kernels, op, name_of_device, device):
    """Compares forward and backward with the reference.

    Devices other than the CPU need ``--device``.
    """
    if name_of_device not in ("cpu", device):
        pytest.skip(f"runs with --device {name_of_device}")
    for call in op.calls(device=name_of_device):
        leaves = {name: call.arguments[name].requires_grad_() for name in op.differentiable}
        found = []
        for implementation in ("torch.ops", "reference"):
            results = call.through(IMPLEMENTATIONS[implementation])
            results = results if isinstance(results, tuple) else (results,)
            assert all(result.device.type == name_of_device for result in results)
            if leaves:
                results += torch.autograd.grad(results[0].square().sum(), [*leaves.values()])
            found.append(results)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@OPS
def test_its_docstring_has_every_section(op):
    text = inspect.getdoc(getattr(functional, op.name))
    for section in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert section in text
    for argument in inspect.signature(getattr(functional, op.name)).parameters:
        assert re.search(rf"^ +{argument}: ", text, re.MULTILINE)

"""An operator is one word: in the schema, the function, the reference, the C++ file, the test and the benchmark."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import cases
import qatfast
from qatfast import functional, reference

ROOT = Path(__file__).parent.parent
OPS = pytest.mark.parametrize("op", cases.OPS)


def schemas():
    """{operator: schema} as csrc/library.cpp defines them."""
    source = (ROOT / "csrc" / "library.cpp").read_text()
    source = re.sub(r'"\s*\n\s*"', "", source)
    return {text.split("(")[0]: text for text in re.findall(r'm\.def\(\s*"([^"]+)"', source)}


def test_there_are_no_others():
    public = {
        name for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"
    }
    assert {name for name in public if vars(functional)[name].__module__ == "qatfast.functional"} == set(
        cases.OPS
    )
    internal = {
        "fake_quantize_affine_forward",
        "fake_quantize_affine_backward",
        "qat_linear_forward",
        "qat_linear_int8_weight",
        "qat_linear_int8",
        "qat_linear_int8_forward",
        "qat_linear_int8_input",
        "qat_linear_int8_backward",
        "qat_linear_grad_weight",
    }
    assert set(schemas()) == {*cases.OPS, *internal}


@OPS
def test_the_package_exports_it(op):
    assert op in qatfast.__all__
    assert getattr(qatfast, op) is getattr(functional, op)


@OPS
def test_the_reference_has_the_same_signature(op):
    ours, theirs = (inspect.signature(getattr(module, op)) for module in (functional, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@OPS
def test_the_schema_has_the_same_arguments(op):
    arguments = schemas()[op].split("(", 1)[1].rsplit(") ->", 1)[0]
    names = [
        argument.split()[-1].split("=")[0] for argument in re.sub(r"\[[^\]]*\]", "", arguments).split(", ")
    ]
    public = list(inspect.signature(getattr(functional, op)).parameters)
    if op == "qat_linear":
        public = [*public[:3], "specs", "*", "dtype"]
    assert names == public


@OPS
def test_torch_ops_has_it(kernels, op):
    assert hasattr(torch.ops.qatfast, op)
    assert str(getattr(torch.ops.qatfast, op).default._schema).startswith(f"qatfast::{op}(")


@OPS
def test_the_direct_entry_has_it(kernels, op):
    assert callable(getattr(kernels, op))


@OPS
@pytest.mark.parametrize(
    "place", ["csrc/cpu/{}.cpp", "csrc/cuda/{}.c*", "tests/test_{}.py", "benchmarks/bench_{}.py"]
)
def test_it_has_its_files(op, place):
    if place.startswith("benchmarks") and not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not here")
    assert list(ROOT.glob(place.format(op)))


@OPS
def test_no_other_file_of_a_device_is_an_operator_of_another_name(op):
    files = {path.stem for path in (ROOT / "csrc").glob("c*/*.c*") if not path.stem.startswith("loops")}
    shared = {"copy", "instruction_set", "plan"} | {
        path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cuh")
    }
    assert files <= {*cases.OPS, *shared}


@OPS
def test_its_docstring_has_every_section(op):
    text = inspect.getdoc(getattr(functional, op))
    for section in ("Args:", "Returns:", "Raises:", "Source:", "Example:"):
        assert section in text
    for argument in inspect.signature(getattr(functional, op)).parameters:
        assert re.search(rf"^ +{argument}: ", text, re.MULTILINE)

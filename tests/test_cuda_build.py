"""The machine code of the CUDA kernels is small and has no spills; the compiler has no warnings."""

import pytest

import ptxas

# The kernels of ranges that modules keep, and all others.
RANGES = ("fake_quantize_learned", "observe_range", "search_qparams")
MOST_BYTES, MOST_BYTES_OF_RANGES = 3 << 20, 1 << 20


@pytest.mark.slow
def test_no_spills_no_warnings_and_small(tmp_path):
    if reason := ptxas.why_not():
        pytest.skip(reason)
    cubins = ptxas.cubins(tmp_path)
    kernels = [kernel for cubin in cubins for kernel in cubin.kernels]
    # There is a kernel per operator and dtype; the backward has a kernel per element size.
    assert len(kernels) >= 4 * len(ptxas.SOURCES) - 1
    assert not [kernel for kernel in kernels if kernel.spills]
    assert not [line for cubin in cubins for line in cubin.warnings]
    of_ranges = sum(cubin.size for cubin in cubins if cubin.source.stem in RANGES)
    assert sum(cubin.size for cubin in cubins) - of_ranges < MOST_BYTES
    assert of_ranges < MOST_BYTES_OF_RANGES

"""The conformance suite over the chunked CUDA C++ backends, compiled for and executed on a CPU, a check at a time."""

import pytest


@pytest.mark.engine("cuda_on_cpu")
@pytest.mark.parametrize("backend", ["cupy_chunked", "cupy_cut", "cupy_cut_bf16"])
def test_conforms(conforms, engine_check, backend):
    conforms(backend, engine_check)

"""The conformance suite over the chunked CUDA C++ backend, compiled for and executed on a CPU, one check at a time."""

import pytest


@pytest.mark.engine("cuda_on_cpu")
def test_conforms(conforms, engine_check):
    conforms("cupy_chunked", engine_check)

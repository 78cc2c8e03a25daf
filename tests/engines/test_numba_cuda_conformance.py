"""The conformance suite over the Numba CUDA backend, executed on a CPU, one check at a time."""

import pytest


@pytest.mark.engine("numba_simulator")
def test_conforms(conforms, engine_check):
    conforms("numba_cuda", engine_check)

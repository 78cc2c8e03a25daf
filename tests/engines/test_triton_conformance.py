"""The conformance suite over the Triton backend, interpreted on the CPU, one check at a time."""

import pytest


@pytest.mark.engine("triton_interpreter")
def test_conforms(conforms, engine_check):
    conforms("triton", engine_check)

"""The conformance suite over the Triton backends, interpreted on the CPU, one check at a time."""

import pytest


@pytest.mark.engine("triton_interpreter")
@pytest.mark.parametrize("backend", ["triton", "triton_chunked"])
def test_conforms(conforms, engine_check, backend):
    conforms(backend, engine_check)

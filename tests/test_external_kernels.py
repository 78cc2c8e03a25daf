"""The Triton kernels around other libraries' own, interpreted on the CPU, against torch."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

#: In a process of its own: whether kernels compile or are interpreted is decided when Triton is imported.
INTERPRETED = """
    import torch
    from isokern.engines.triton_interpreter.engine import activate

    engine = activate()
    from isokern.backends.external import around
    from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
    from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
    from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

    base = CaseSpec("gates", (5, 0, 9), h=1, hv=3, k=6, v=5, distribution="extreme", gate_dtype="float32")
    for spec in (
        base,
        base.but(is_kda=True, neg_eigval=True, strides="any"),
        base.but(is_kda=True, lower_bound=-5.0, gate_dtype="bfloat16"),
        base.but(softplus_beta=0.5, softplus_threshold=3.0, strides="rows"),
    ):
        call = canonical_call(**make_inputs(spec).kwargs)
        for linear in (False, True):
            want = around.gates(call, call.a, call.b, linear)
            got = around._launch_gates(call, call.a, call.b, linear)
            for x, y in zip(got, want, strict=True):
                assert x.shape == y.shape and x.dtype is y.dtype is torch.float32 and x.is_contiguous()
                torch.testing.assert_close(x, y, rtol=3e-6 if not linear else 3e-5, atol=1e-37)

    for strides, dtype in (("dense", "float32"), ("any", "bfloat16"), ("rows", "float16")):
        spec = CaseSpec("states", (5, 0, 9, 1), k=40, v=96, padded=(3,), strides=strides, state_dtype=dtype)
        for index in ("int32", "int64"):
            call = canonical_call(**make_inputs(spec.but(index_dtype=index)).kwargs)
            for kind in (None, torch.float32):
                want = around.gather_states(call.pool, call.read_slots, kind)
                got = torch.full_like(want, 7.0)
                around._copy_states(call.pool, got, call.read_slots, None, gather=True)
                assert torch.equal(got, want)
            states = torch.randn(want.shape)
            for cu in (None, call.cu_seqlens):
                mine, theirs = call.pool.clone(), call.pool.clone()
                around._copy_states(mine, states, call.read_slots, cu, gather=False)
                around.scatter_states(states, theirs, call.read_slots, cu)
                assert torch.equal(mine, theirs) and not torch.equal(mine, call.pool)

    source, end = torch.randn(9, 3, 700), torch.tensor([0, 4, 7], dtype=torch.int64)[-1:]
    out = torch.full((9, 3, 1400), 7.0, dtype=torch.bfloat16)[..., ::2]
    around._copy_rows(source, out, end)
    assert torch.equal(out[:7], source[:7].bfloat16()) and bool((out[7:] == 7.0).all())
    print("ok")
"""


def test_interpreted_they_do_what_torch_does():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERPRETED)], capture_output=True, text=True, check=False
    )
    assert run.stdout.endswith("ok\n"), run.stderr[-3000:]

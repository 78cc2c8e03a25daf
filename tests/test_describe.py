"""A case described without tensors is the same problem as the call made from it."""

from __future__ import annotations

import pytest

from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

BASE = CaseSpec("base", (3, 0, 9))


@pytest.mark.parametrize(
    "spec",
    [
        BASE,
        BASE.but(as_layout=True, cu_dtype="int64", index_dtype="int64"),
        BASE.but(varlen=False, lengths=(4, 4)),
        BASE.but(state_dtype=None),
        BASE.but(state_dtype="bfloat16", state_layout="vk", io_dtype="float16", gate_dtype="float32"),
        BASE.but(is_kda=True, lower_bound=-5.0, neg_eigval=True, l2norm=False, scale=0.5, softplus_threshold=5.0),
        BASE.but(update="separate"),
        BASE.but(update="disabled", verify="chain"),
        BASE.but(verify="tree", intermediate_dtype="bfloat16"),
        BASE.but(strides="rows"),
        BASE.but(strides="rows", is_kda=True, verify="chain"),
        BASE.but(strides="any"),
        BASE.but(lengths=(1,) * 5),
        BASE.but(lengths=()),
        BASE.but(lengths=(0, 0)),
    ],
    ids=lambda s: f"{s.update}-{s.verify}-{s.strides}-{s.n}x{s.tokens}",
)
def test_description_equals_the_call(spec):
    assert describe(spec, "cpu") == canonical_call(**make_inputs(spec).kwargs).problem("eager")

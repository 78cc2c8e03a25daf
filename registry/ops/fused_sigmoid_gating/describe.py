"""From a CaseSpec to its Problem without making any tensor up: what a call of that case would be dispatched as."""

from __future__ import annotations

from typing import Literal

from ...accuracy import DEFAULT, Accuracy
from ...varlen.profile import VarlenProfile
from .case import CaseSpec
from .problem import Problem

__all__ = ["describe"]


def describe(
    spec: CaseSpec,
    device: str,
    arch: int = 0,
    mode: Literal["eager", "graph"] = "eager",
    accuracy: Accuracy = DEFAULT,
) -> Problem:
    """The Problem of ``make_inputs(spec, device=device)``; tests hold the two equal.

    Args:
        spec: the case. device: ``cpu`` or ``cuda``. arch: compute capability times ten on a GPU.
        mode: launch mode to describe it for. accuracy: policy to describe it for.
    """
    has_pool = spec.state_dtype is not None
    return Problem(
        device=device,
        arch=arch,
        mode=mode,
        h=spec.h,
        hv=spec.hv,
        k=spec.k,
        v=spec.v,
        io_dtype=spec.io_dtype,
        a_dtype=spec.gate_dtype,
        b_dtype=spec.gate_dtype,
        A_log_dtype=spec.A_log_dtype,
        dt_bias_dtype=spec.dt_bias_dtype,
        state_dtype=spec.state_dtype,
        state_layout=spec.state_layout,
        is_kda=spec.is_kda,
        lower_bound=spec.lower_bound is not None,
        l2norm=spec.l2norm,
        neg_eigval=spec.neg_eigval,
        custom_scale=spec.scale is not None and spec.scale != spec.k**-0.5,
        custom_softplus=(spec.softplus_beta, spec.softplus_threshold) != (1.0, 20.0),
        update=spec.update if has_pool else "none",
        intermediates=spec.verify,
        intermediate_dtype=spec.intermediate_dtype if spec.verify != "none" else None,
        index_dtype=spec.index_dtype if has_pool else None,
        row_dtype=spec.index_dtype if spec.verify != "none" else None,
        parent_dtype=spec.index_dtype if spec.verify == "tree" else None,
        varlen=spec.varlen,
        cu_dtype=spec.cu_dtype if spec.varlen else None,
        lengths_on_host=not spec.varlen or spec.as_layout or device == "cpu",
        strides=spec.strides,
        grad=False,
        profile=VarlenProfile.of(spec.n, spec.tokens, max(spec.lengths, default=0)),
        accuracy=accuracy,
    )

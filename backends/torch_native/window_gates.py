"""Decay and beta of a window of steps, for the heads of one block."""

from __future__ import annotations

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.gates import beta_of, log_decay
from .rows import Window
from .sequences import Heads

__all__ = ["WindowGates"]


class WindowGates:
    """The gate parameters of a block's heads, applied window by window."""

    def __init__(self, call: Call, heads: Heads, compute: torch.dtype) -> None:
        self._call = call
        self._compute = compute
        self._values = heads.values
        A_log = call.A_log[heads.values].to(compute)
        self._A_log = A_log[:, None] if call.is_kda else A_log
        self._dt_bias = call.dt_bias[heads.values].to(compute)

    def __call__(self, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
        """``g [n, width, heads]`` (KDA: ``[n, width, heads, K]``) and ``beta [n, width, heads]``.

        Rows that are not real get ``g = 0`` and ``beta = 0``: a step that changes nothing.
        """
        call = self._call
        x = window.take(call.a[:, :, self._values]).to(self._compute) + self._dt_bias
        g = log_decay(self._A_log, x, call.softplus_beta, call.softplus_threshold, call.lower_bound)
        beta = beta_of(window.take(call.b[:, :, self._values]).to(self._compute), call.allow_neg_eigval)
        if window.valid is not None:
            real = window.valid[:, :, None]
            beta = beta.where(real, beta.new_zeros(()))
            g = g.where(real[..., None] if call.is_kda else real, g.new_zeros(()))
        return g, beta
